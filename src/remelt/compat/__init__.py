"""The names of other tools over the real interface, so that their scripts run with only the import changed.

Nothing here computes: a folder for each tool says what its words mean, and hands on.
"""

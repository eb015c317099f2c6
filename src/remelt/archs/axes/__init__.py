"""The axis groups of known models, one file for each part: written by hand, for the keys of the original dialect.

`draft` is the vocabulary in which they are written; `find` chooses among them.
"""

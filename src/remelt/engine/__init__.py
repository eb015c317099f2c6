"""The engine: reads tiles, computes, and writes each tensor at its final place.

Read `tiles` (one task), `finite`, `sink` and `commit` (where results go), `run` (threads).
"""

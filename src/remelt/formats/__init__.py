"""Formats: bytes on disk or in memory, opened by their headers alone, and the layout of what is written.

Read `checkpoint` (what every format gives), `safetensors`, `sharded`, `pickle`, `memory`, then `layout` (where output
bytes go) and `locate` (names to files).
"""

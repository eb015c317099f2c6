"""The grammars in which recipes were written before version 1: an instruction a line, results by number.

Read `instructions` (lines to words), `methods` and `composed`, `weights` and `blocks` (what old names mean today),
`reader`; `writer` writes the last of them, version 0.1.0, for those who run recipes elsewhere.
"""

"""Recipes as text: read into the graph without knowing any method, written from it in one canonical way.

Read `statements` (lines to statements, with the limits), `reader` (statements to nodes), `writer`. The grammar is in
the documentation. Readers of older grammars join `reader.read_recipe`, which chooses by content.
"""

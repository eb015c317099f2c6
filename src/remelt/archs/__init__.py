"""What a state dict looks like: its blocks and components, inferred from key names, and the names that people use.

Read `structure` (blocks of any architecture), `arch` (the declarative files in `named/`, read by `reader`), `facts`
(both applied to a set of keys), `detect` (which arch a file is, and why), `shapes` (the true keys and shapes
of the named ones). Nothing here imports torch.
"""

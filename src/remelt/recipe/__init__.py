"""The recipe: immutable nodes, the walks over them, what a merge method declares, block weights, and composition.

Read `node`, `walk`, `blocks`, `method`, `signature`, `compose`. Building a recipe does no input or output at all, and
nothing here imports torch.
"""

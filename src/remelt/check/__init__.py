"""Check: what a recipe means for the inputs at hand, and every reason why it cannot be merged, at once.

Read `bound` (calls bound to methods), `spaces`, `inputs` (opened models and their archs), `names` (block weights),
`program` and `keys` (what happens to each key). Headers only: no tensor is read here.
"""

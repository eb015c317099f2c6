"""Derives axis groups from the graph that torch.export makes of a module. Shares nothing with written specifications.

`tracing` follows the graph; `labels` are the index sets that it ties, `splitting` and `tying` what happens to them.
Rules for operations are in `pointwise`, `layouts`, `contractions`, `normalisations` and `choices`, on what `calls` has.
`stretches`, `levels` and `grouping` make groups of the labels that are left.
"""

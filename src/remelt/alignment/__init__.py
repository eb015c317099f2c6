"""Alignment of models by permutations that leave their function as it is (git re-basin).

`permutation` is what is found and applied; `assignment` finds the best permutation of one group from inner products,
`matching` goes through the groups until none can be bettered; `files` keeps what was found. `margins` prove that none
can be. `many` aligns several models; `activations` matches by what modules answer; `rotations` turns attention
heads afterwards; `repair` sets the statistics of what was merged. `checking` runs what `instances` makes, to see that
axis groups keep the function.
"""

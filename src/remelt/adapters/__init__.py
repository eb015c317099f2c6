"""Adapters: small files that say how a model is to be changed, read as differences of models.

Read `names` (which module of an adapter a tensor is of, and which part of it), `pairing` (which tensor of a model that
module changes), `change` and `kinds` (by how much), then `checkpoint`, which shows an adapter as a checkpoint of
differences that are computed where they are read.
"""

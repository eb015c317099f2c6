"""What every floor speaks of: element types, tensor shapes, byte counts, names, registries, random numbers.

Read `dtype`, `tensor_info`, `units`, `nearest`, `registry`, `random`. Nothing here imports torch.
"""

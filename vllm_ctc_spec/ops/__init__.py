"""Kernels of tree verification: attention of the tree rows, and the move of accepted keys and values.

`tree_batch` describes a step and `reference` computes it in plain PyTorch. `cpu` does the same in C++, `triton` on
CUDA GPUs, and `xformers` is another attention kernel for these. `support` says what the GPU kernels can run on.
"""

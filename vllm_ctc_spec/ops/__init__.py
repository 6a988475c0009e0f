"""Kernels of tree verification: attention of the tree rows, and the move of accepted keys and values.

`tree_batch` describes a step, and `reference` computes it in plain PyTorch. `cpu` has the kernels in C++, `triton`
those for CUDA GPUs, and `xformers` another attention kernel for them. `support` checks what these can run on.
"""

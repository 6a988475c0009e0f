"""Kernels of tree verification, with a plain version of each."""

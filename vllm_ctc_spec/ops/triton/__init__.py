"""Tree attention and the K/V move on CUDA GPUs, in Triton, and how the kernels are launched."""

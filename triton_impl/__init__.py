"""Triton twins of the CUDA kernels: the same loop and the same names, to be read side by side."""

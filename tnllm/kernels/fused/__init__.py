"""Triton kernels of the small operators; their ops import them on CUDA only."""

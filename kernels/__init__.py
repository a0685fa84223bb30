"""Triton kernels, installed as `maefast.kernels`."""

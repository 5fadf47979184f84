"""Triton kernels, installed as lorun_fast.kernels. One file per op; no public names."""

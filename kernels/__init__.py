"""Triton kernels and the launchers that allocate for them, one module an op."""

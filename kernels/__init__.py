"""Triton kernels and their launchers, which allocate what they need: one module for each op."""

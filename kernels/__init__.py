"""Triton kernels, one family of ops per file. Imports torch, Triton and `steepest.ops.program`."""

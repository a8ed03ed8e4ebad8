"""Triton kernels, one op per file. Imports torch and Triton only."""

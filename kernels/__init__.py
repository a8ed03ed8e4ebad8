"""Triton kernels, one family of ops per file. Imports torch and Triton only."""

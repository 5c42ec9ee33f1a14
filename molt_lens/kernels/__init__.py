"""Triton kernels of maps; `cayley_interp.kernels` says when they run."""

"""Triton kernels, one module an op: kernels, launch functions, autograd function, custom op. Imported when one runs."""

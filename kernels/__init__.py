"""The operations a Llama-family step spends its time in, each as plain PyTorch (its specification) and as a Triton
kernel.

`select_kernels` chooses; every file says what its operation computes, where it is from, and what it moves and
multiplies. Importing this package does not import Triton.
"""

from .dispatch import OPERATIONS, Kernels, select_kernels

__all__ = ["OPERATIONS", "Kernels", "select_kernels"]

"""Correct bfloat16, and casts to 8-bit floats, in Triton's CPU interpreter; fp32 and fp16 need nothing.

The interpreter keeps bf16 as uint16 bit patterns: dot products and elementwise operators compute on the patterns, and
a cast from fp32 truncates instead of rounding to nearest even. Its casts to 8-bit floats lose NaN and small numbers.
`correct_bf16` replaces the four places that do so (the same in triton 3.6 to 3.9). TRITON_INTERPRET=1 must be set
before triton is first imported.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 patterns -> fp32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 values -> bf16 patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def correct_bf16() -> None:
    cast, dot, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
    narrow = InterpreterBuilder.create_fp_to_fp

    def is_bf16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def as_fp32(handle: Any) -> Any:
        return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bf16(source) and target.scalar == tl.float32:
            return TensorHandle(widened(source.data), target.scalar)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(narrowed(source.data), target.scalar)
        return cast(self, source, target)

    def create_dot(self: Any, left: Any, right: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, as_fp32(left), as_fp32(right), accumulator, *rest)

    def binary_op(self: Any, left: Any, right: Any, operator: Any) -> Any:
        if not is_bf16(left):
            return binary(self, left, right, operator)
        result = binary(self, as_fp32(left), as_fp32(right), operator)
        if result.data.dtype == np.float32:
            return TensorHandle(narrowed(result.data), tl.bfloat16)
        return result  # a comparison

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar in FP8:
            codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(FP8[target.scalar]).view(torch.uint8)
            return TensorHandle(codes.numpy(), target.scalar)
        return narrow(self, source, target, rounding)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op

"""Tensor layout and launch sizes for the Triton kernels: strided rows without copies, tile sizes, program counts."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

INTERPRETED_PROGRAMS = 3  # on a CPU, few enough that every program of a looping kernel takes several turns


@dataclass(frozen=True)
class Rows:
    """A tensor as rows of its last dimension: row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride.

    Two strides describe every view of interest without a copy, e.g. the query heads inside a fused QKV projection.
    """

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def as_rows(x: Tensor) -> Rows:
    """`x` [..., columns] as rows, copied only if its leading dimensions need more than two strides."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    levels: list[tuple[int, int]] = []  # (size, stride) from the innermost dimension outwards
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return as_rows(x.contiguous())
    levels += [(1, 0)] * (2 - len(levels))
    (inner, inner_stride), (outer, outer_stride) = levels
    return Rows(x, inner * outer, inner, outer_stride, inner_stride)


def obstacle(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take this tensor (its dtype, or not the current device), or None."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return f"a tensor on {x.device}, where torch.cuda.set_device chose cuda:{torch.cuda.current_device()}"
    return None if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else f"dtype {x.dtype}"


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def warps_for(elements: int) -> int:
    """Warps for a tile of this many elements: 16 elements per thread, or two 16-byte accesses of bf16 in flight."""
    return min(max(elements // 512, 1), 16)


@lru_cache
def program_count(device: torch.device) -> int:
    """How many programs a kernel that loops over its work should start: two per multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count

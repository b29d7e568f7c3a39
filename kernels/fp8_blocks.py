"""Casts to 8-bit floats with a scale for each block, and products of such matrices: the specification in plain PyTorch.

As in DeepSeek-V3 (arXiv:2412.19437, section 3.3): rows of activations and gradients have a scale for each 128 numbers,
weights one for each block of 128 x 128. What is summed over has its scales in every block of 128, so a product adds
its blocks' products in fp32, each times its scales. Scales and codes are those of `fp8.py` with the magnitude of a
block; the last block of a row or column may be smaller. The Triton form with the same signatures is in
`fp8_blocks_triton.py`.

Shapes: N rows, K columns, M rows of a second factor; O x I a weight; n, k, m, o, i their blocks of 128.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .fp8 import check, scale_of

BLOCK = 128


def block_count(size: int) -> int:
    return -(-size // BLOCK)


def _code(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (x / scale).clamp(-limit, limit).to(dtype)


def fp8_cast_blocks(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [N, K] of `dtype`, row-major; scales [k, N], fp32: of each 128 numbers of a row)."""
    check(x_NK, dtype)
    rows, width = x_NK.shape
    x = functional.pad(x_NK.float(), (0, -width % BLOCK)).view(rows, block_count(width), BLOCK)
    scale_Nk = scale_of(x.abs().amax(2), dtype)
    codes = _code(x, scale_Nk.unsqueeze(2), dtype).view(rows, block_count(width) * BLOCK)
    return codes[:, :width].contiguous(), scale_Nk.t().contiguous()


def fp8_cast_weight_blocks(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [O, I] of `dtype`, row-major; scales [o, i], fp32; the same codes of the transpose [I, O], row-major)."""
    check(weight_OI, dtype)
    outputs, inputs = weight_OI.shape
    down, across = block_count(outputs), block_count(inputs)
    x = functional.pad(weight_OI.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK)).view(down, BLOCK, across, BLOCK)
    scale_oi = scale_of(x.abs().amax((1, 3)), dtype)
    codes = _code(x, scale_oi[:, None, :, None], dtype).view(down * BLOCK, across * BLOCK)[:outputs, :inputs]
    return codes.contiguous(), scale_oi, codes.t().contiguous()


def fp8_block_product(
    a_NK: Tensor, a_scale_kN: Tensor, b_MK: Tensor, b_scale_mk: Tensor, out_NM: Tensor | None = None
) -> Tensor:
    """a b^T, bf16 [N, M], of codes and their scales as the casts give them; `b_scale_mk` may be a transposed view.
    Written to `out_NM` (contiguous) if given."""
    total = torch.zeros(a_NK.shape[0], b_MK.shape[0], device=a_NK.device)
    of_row_Mk = b_scale_mk.repeat_interleave(BLOCK, 0)[: b_MK.shape[0]]
    for block in range(block_count(a_NK.shape[1])):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        product = a_NK[:, here].float() @ b_MK[:, here].float().t()
        total += product * a_scale_kN[block, :, None] * of_row_Mk[:, block]
    return total.bfloat16() if out_NM is None else out_NM.copy_(total)

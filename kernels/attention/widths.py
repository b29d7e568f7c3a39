"""Values of another width than queries and keys, as latent attention has them, for forms that know one width only.

The narrower are padded with zeros: zeros beside queries and keys add nothing to a score, and those beside values come
out as zeros, which are cut off.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("megalite.kernels")


def padded(q_SBHD: Tensor, k_TBKD: Tensor, v_TBKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with heads of the wider of both widths."""
    extra = k_TBKD.shape[-1] - v_TBKV.shape[-1]
    if extra >= 0:
        return q_SBHD, k_TBKD, F.pad(v_TBKV, (0, extra)) if extra else v_TBKV
    return F.pad(q_SBHD, (0, -extra)), F.pad(k_TBKD, (0, -extra)), v_TBKV


def at_one_width(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention`, a form for heads of one width, for values of another as well; said once in the log."""
    told: set[tuple[int, int]] = set()

    @functools.wraps(attention)
    def call(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Any:
        key, value = k_SBKD.shape[-1], v_SBKD.shape[-1]
        if key == value:
            return attention(q_SBHD, k_SBKD, v_SBKD, **options)
        if (key, value) not in told:
            told.add((key, value))
            logger.info(
                "kernels.attention: heads of %d for keys and %d for values are padded to %d: "
                "the fused forms have one width",
                *(key, value, max(key, value)),
            )
        if options.get("scale") is None:
            options["scale"] = key**-0.5
        result = attention(*padded(q_SBHD, k_SBKD, v_SBKD), **options)
        if isinstance(result, tuple):
            return result[0][..., :value], *result[1:]
        return result[..., :value]

    return call

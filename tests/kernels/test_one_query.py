"""Attention of a single query, as generation calls it for every token: the reference's, in the forms that shortcut."""

from __future__ import annotations

import pytest
import torch

from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.cpu import attention_cpu
from megalite.kernels.attention.sdpa import attention_sdpa

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("form", [attention_sdpa, attention_cpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5, 50])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_one_query(form, dtype, window, padded, heads, kv_heads) -> None:
    """Keys as a cache keeps them, a row's beside each other; padding on the left of some rows, or none."""
    batch, keys, width = 3, int(torch.randint(9, 40, ())), 24
    q = torch.randn(1, batch, heads, width).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, 50, width).to(dtype).permute(0, 3, 1, 2, 4)[:, :keys]
    documents = None
    if padded:
        documents = (torch.arange(keys)[:, None] >= torch.tensor([0, 4, keys - 1])).int()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for options in ({"window": window, "documents": documents}, {"scale": 0.7, "causal": False}):
        expected = attention_reference(q, k, v, **options)
        torch.testing.assert_close(form(q, k, v, **options), expected, atol=limit, rtol=limit)

"""Attention over parts of the keys: the plain form and the compiled one, with every set of instructions."""

import pytest
import torch
from torch.testing import assert_close

from megalite.kernels import native, select_kernels
from megalite.kernels.attention.parts import PLAIN_PARTS, PlainParts, Seen, merge
from tests.kernels.attention_part_checks import check

pytestmark = pytest.mark.fast
FORMS = ["plain", *([] if native.obstacle() else native.extension().usable)]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "plain":
        return PLAIN_PARTS
    chosen = getattr(native.extension(), request.param)
    monkeypatch.setattr(native, "variant", lambda: chosen)
    return native.NativeParts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"window": 7}, {"packed": True, "window": 11}, {"window": 2}, {"softcap": 1.5}]
)
def test_a_form_agrees_with_the_formula(form, dtype, options):
    check(form, dtype=dtype, limit=2e-6 if dtype == torch.float32 else 2e-2, **options)


@pytest.mark.parametrize(("heads", "width"), [((1, 1), 5), ((5, 5), 64), ((12, 3), 33)])
def test_odd_heads(form, heads, width):
    check(form, heads=heads, width=width, packed=True)


def test_small_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr("megalite.kernels.attention.parts._BLOCK_ELEMENTS", 1500)
    check(PlainParts(), packed=True, window=9)


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(form):
    seen = Seen.between(torch.arange(6), torch.tensor([4, 9]))
    assert seen.last_BS.tolist() == [[0, 0, 0, 0, 1, 1]]
    q, k, v, grad = torch.randn(6, 1, 2, 8), *torch.randn(2, 2, 1, 2, 8), torch.randn(6, 1, 2, 8)
    out, lse = form.forward(q, k, v, seen, 1.0)
    assert (out[:4] == 0).all() and (lse[..., :4] == -torch.inf).all() and lse[..., 4:].isfinite().all()
    assert_close(out[4:], v[:1].expand(2, -1, -1, -1))
    grad_q, grad_k, grad_v = form.backward(grad, q, k, v, out, lse, seen, 1.0)
    assert (grad_q[:4] == 0).all() and (grad_k[1] == 0).all() and (grad_v[1] == 0).all()
    assert_close(grad_v[0], grad[4:].sum(0))


def test_nan_is_not_hidden_by_the_mask(form):
    """A NaN in what a query sees reaches its output; one in what it does not see does not."""
    seen = Seen.between(torch.arange(4), torch.arange(4))
    q, k, v = torch.randn(3, 4, 1, 1, 8)
    k[2] = torch.nan
    out, _ = form.forward(q, k, v, seen, 1.0)
    assert out[:2].isfinite().all() and out[2:].isnan().all()


def test_merging_with_nothing():
    none = torch.zeros(3, 1, 2, 4), torch.full((1, 2, 3), -torch.inf)
    some = torch.randn(3, 1, 2, 4), torch.randn(1, 2, 3)
    for merged in (merge(*none, *some), merge(*some, *none)):
        assert_close(merged, some)
    assert_close(merge(*none, *none), none)


def test_the_form_follows_the_choice_of_attention():
    cpu = torch.device("cpu")
    compiled = native.NativeParts if native.obstacle() is None else PlainParts
    assert type(select_kernels({}, cpu).attention_parts) is compiled
    for named in ("reference", "sdpa"):
        assert type(select_kernels({"attention": named}, cpu).attention_parts) is PlainParts

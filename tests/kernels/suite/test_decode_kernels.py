"""One query a row against a buffer, in Triton: the float64 reference, whatever lies beyond what is filled."""

import pytest
import torch

from megalite.kernels import select_kernels
from megalite.kernels.attention import attention_reference, decode_triton
from megalite.kernels.attention.decode import Filled, decode_attention
from tests.kernels.suite.kernel_checks import close


def buffers(device, capacity, batch, heads, kv_heads, width, dtype, count, first):
    """(q, keys, values, Filled): NaN where nothing was filled; a row's places are neighbours, as a cache has them."""
    q = torch.randn(1, batch, heads, width, device=device).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, capacity, width, device=device).to(dtype).unbind(0)
    for row, begin in enumerate(first):
        for x in (k, v):
            x[row, :, :begin] = x[row, :, count:] = torch.nan
    filled = Filled(torch.tensor(first, device=device), torch.tensor([count], device=device))
    return q, k.movedim(2, 0), v.movedim(2, 0), filled


def check(q, k, v, filled, factor=1.0, **options):
    got = decode_triton.decode_attention(q, k, v, filled, **options)
    close("output", got, decode_attention(q.double(), k.double(), v.double(), filled, **options), q.dtype, factor)
    return got


@pytest.fixture(params=[1, 4, 64])
def room(request, monkeypatch):
    """Programs that the device has room for: few and many parts of a row."""
    monkeypatch.setattr(decode_triton, "program_count", lambda device: 6 * request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "capacity", "count"),
    [(4, 2, 64, 330, 290), (3, 1, 40, 300, 1), (2, 2, 16, 260, 256), (24, 1, 256, 130, 101)],
)
def test_grouped_heads_and_padding(device, room, dtype, heads, kv_heads, width, capacity, count):
    """MHA, GQA, MQA, more query heads than a product's least rows, odd widths; rows with padding, and one full row."""
    first = [0, count // 3, count - 1]
    check(*buffers(device, capacity, 3, heads, kv_heads, width, dtype, count, first), factor=1.5)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 70}, {"window": 900}, {"softcap": 2.0, "scale": 0.4}])
def test_options(device, room, options):
    check(*buffers(device, 384, 2, 4, 2, 32, torch.float32, 300, [0, 250]), factor=2, **options)


@pytest.mark.parametrize("capacity", [300, 70])
def test_a_row_that_sees_nothing_gives_zeros(device, room, capacity):
    """In several parts, and in one."""
    tensors = buffers(device, capacity, 2, 2, 1, 32, torch.float32, 40, [0, 60])
    assert (check(*tensors)[:, 1] == 0).all()


def test_the_count_is_read_where_it_lies(device, room):
    """One launch's arguments serve every length: the same tensors, after another count was written into them."""
    q, k, v, filled = buffers(device, 400, 2, 4, 2, 32, torch.float32, 400, [0, 3])
    for count in (4, 129, 400):
        filled.count_1.fill_(count)
        numbers = (torch.arange(count, device=device)[:, None] >= filled.first_B).int()
        expected = attention_reference(q, k[:count].nan_to_num(), v[:count].nan_to_num(), documents=numbers)
        close("output", check(q, k, v, filled), expected, torch.float32)


def test_nan_that_is_seen_is_not_lost(device, room):
    q, k, v, filled = buffers(device, 300, 1, 2, 1, 32, torch.float32, 280, [0])
    v[270] = torch.nan
    assert decode_triton.decode_attention(q, k, v, filled).isnan().all()


def test_a_row_repeats_bitwise(device, room):
    tensors = buffers(device, 500, 3, 4, 2, 64, torch.bfloat16, 400, [0, 9, 301])
    results = [decode_triton.decode_attention(*tensors) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_form_of_attention_decides(device):
    """`triton` has this kernel, and the plain form for what it does not support; every other choice has the plain form
    alone."""
    chosen = select_kernels({"attention": "triton"}, device).decode_attention
    assert chosen.__wrapped__ is decode_triton.decode_attention
    assert select_kernels({"attention": "sdpa"}, device).decode_attention is decode_attention
    for heads, width in ((2, 300), (130, 16)):
        tensors = buffers(device, 70, 2, heads, 1, width, torch.float32, 40, [0, 7])
        assert torch.equal(chosen(*tensors), decode_attention(*tensors))


@pytest.mark.parametrize(
    ("capacity", "programs", "room", "expected"),
    [(1 << 20, 1, 264, 64), (1024, 1, 264, 8), (1024, 64, 264, 4), (64, 1, 264, 1), (4096, 512, 264, 1)],
)
def test_parts(capacity, programs, room, expected):
    """Of heads of 64 in bf16, 128 keys a tile."""
    assert decode_triton.parts(capacity, programs, room, 64, 2) == expected

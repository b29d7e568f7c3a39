"""Tensor-parallel layers, collectives and loss against plain PyTorch on one process: outputs and gradients.

Inputs are fresh every run, in float64 where nothing else is said, and groups are late and poison their buffers.
Shapes: S sequence, B micro-batch, I / O features in and out, V vocabulary, R tensor ranks.
"""

import pytest
import torch
from torch.nn import functional

from megalite.config import ModelConfig
from megalite.kernels import select_kernels
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.parallel.collectives import TensorRegion, all_gather_stacked
from megalite.placement import row_box, split_evenly
from tests.support.chaos import ChaosGroups

pytestmark = pytest.mark.fast
REGIONS = [(1, False), (2, False), (2, True), (4, True), (3, False)]


def region_of(rank, ranks, sequence):
    build, groups = build_of(rank, ranks, sequence)
    return build.region, groups


def build_of(rank, ranks, sequence, dtype=torch.float64, **model):
    groups = ChaosGroups(seed=rank)
    mesh = Mesh(tp=ranks, rank=rank, make_group=groups)
    region = TensorRegion(mesh.group("tp"), sequence)
    return Build(ModelConfig(**model), mesh, region, select_kernels({}, mesh.device), dtype), groups


class Reports:
    """A store that only counts how often a parameter reports."""

    ready = True

    def __init__(self):
        self.count = 0

    def gather(self, parameter): ...

    def allocate_gradients(self): ...

    def gradient_added(self, parameter):
        self.count += 1


def cut(tensor_S, region):
    """This rank's part of the sequence."""
    length = tensor_S.shape[0] // region.split
    start = region.group.index * length if region.split > 1 else 0
    return tensor_S[start : start + length].clone()


def join(parts, sequence):
    """The whole from the ranks' parts; without sequence parallelism all must hold the same."""
    if sequence:
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def border(rank, ranks, sequence, x):
    region, groups = region_of(rank, ranks, sequence)
    part = cut(x, region)
    whole = region.gather(part)
    out = region.sum(whole * (rank + 1.0))
    groups.verify()
    return whole, out


@pytest.mark.parametrize(("ranks", "sequence"), REGIONS)
def test_a_region_gathers_at_its_start_and_sums_at_its_end(pool, ranks, sequence):
    x = torch.randn(12, 3, 5, dtype=torch.float64)
    results = pool.run(border, ranks, ranks, sequence, x)
    for whole, _ in results:
        close(whole, x)
    close(join([out for _, out in results], sequence), x * sum(range(1, ranks + 1)))


def stack(rank, ranks, x):
    region, groups = region_of(rank, ranks, False)
    stacked = all_gather_stacked((x * (rank + 1)).t(), region.group)
    groups.verify()
    return stacked


def test_stacked_gather_keeps_ranks_apart(pool):
    x = torch.randn(4, 3)
    for stacked in pool.run(stack, 3, 3, x):
        torch.testing.assert_close(stacked, torch.stack([x.t() * factor for factor in (1, 2, 3)]))


def linears(rank, ranks, sequence, main, column_OI, bias_O, row_IO, x, grad):
    """Column, then SwiGLU-like product, then row, as one block; twice, as two micro-batches would."""
    build, groups = build_of(rank, ranks, sequence)
    region = build.region
    (outs, ins) = column_OI.shape
    start, length = split_evenly(outs, ranks, rank)
    boxes = (row_box("w", (outs, ins), start, length, 0, (rank,)),)
    bias_boxes = (row_box("b", (outs,), start, length, 0, (rank,)),)
    column = build.column(boxes, bias_boxes)
    row = build.row("r", (ins, outs), (start, length))
    mine = slice(start, start + length)
    column.weight.data.copy_(column_OI[mine])
    column.bias.data.copy_(bias_O[mine])
    row.weight.data.copy_(row_IO[:, mine])
    parameters = (column.weight, column.bias, row.weight)
    reports = Reports()
    for parameter in parameters:
        if main:
            parameter.main_grad = torch.zeros_like(parameter.data)
        parameter.store = reports
    part = cut(x, region).requires_grad_()
    for _ in range(2):
        out = row(column(part), prologue=torch.sin) if main else row(torch.sin(column(part)))
        out.backward(cut(grad, region))
    groups.verify()
    assert reports.count == (6 if main else 0)
    grads = [(parameter.main_grad if main else parameter.grad).clone() for parameter in parameters]
    return out.detach(), part.grad, grads


@pytest.mark.parametrize("main", [True, False], ids=["main_grad", "autograd"])
@pytest.mark.parametrize(("ranks", "sequence"), REGIONS)
def test_column_and_row_linear(pool, ranks, sequence, main):
    column_OI, row_IO, bias_O = torch.randn(13, 5).double(), torch.randn(5, 13).double(), torch.randn(13).double()
    x, grad = torch.randn(12, 3, 5).double(), torch.randn(12, 3, 5).double()
    results = pool.run(linears, ranks, ranks, sequence, main, column_OI, bias_O, row_IO, x, grad)
    tensors = [tensor.requires_grad_() for tensor in (column_OI, bias_O, row_IO, x)]
    out = functional.linear(functional.linear(x, column_OI, bias_O).sin(), row_IO)
    expected = [2 * slope for slope in torch.autograd.grad(out, tensors, grad)]
    close(join([result[0] for result in results], sequence), out.detach())
    close(join([result[1] for result in results], sequence), expected[3])
    for index, dim in ((0, 0), (1, 0), (2, 1)):
        close(torch.cat([result[2][index] for result in results], dim), expected[index])


def embed(rank, ranks, sequence, main, table_VH, tokens_BS, grad):
    build, groups = build_of(rank, ranks, sequence, vocab_size=table_VH.shape[0], hidden_size=table_VH.shape[1])
    region, layer = build.region, build.embedding("e", (rank,))
    layer.weight.data.zero_()
    for box in layer.weight.placement.boxes:
        box.view(layer.weight.data).copy_(box.of(table_VH))
    if main:
        layer.weight.main_grad = torch.zeros(layer.weight.shape)
    out = layer(tokens_BS)
    out.backward(cut(grad, region))
    groups.verify()
    slope = layer.weight.main_grad if main else layer.weight.grad
    return out.detach(), [(box.offset[0], box.view(slope).clone()) for box in layer.weight.placement.boxes], slope


@pytest.mark.parametrize("vocabulary", [3, 37])
@pytest.mark.parametrize("main", [True, False], ids=["main_grad", "autograd"])
@pytest.mark.parametrize(("ranks", "sequence"), REGIONS)
def test_embedding(pool, ranks, sequence, main, vocabulary):
    table_VH = torch.randn(vocabulary, 5).double().requires_grad_()
    tokens_BS, grad = torch.randint(vocabulary, (3, 12)), torch.randn(12, 3, 5).double()
    results = pool.run(embed, ranks, ranks, sequence, main, table_VH.detach(), tokens_BS, grad)
    out = functional.embedding(tokens_BS.t(), table_VH)
    (expected,) = torch.autograd.grad(out, table_VH, grad)
    close(join([result[0] for result in results], sequence), out.detach())
    pieces = sorted((piece for _, pieces, _ in results for piece in pieces), key=lambda piece: piece[0])
    total = torch.cat([rows for _, rows in pieces])
    torch.testing.assert_close(total.double(), expected, rtol=1e-5 if main else 1e-9, atol=1e-5 if main else 1e-11)


def head_loss(rank, ranks, sequence, main, table_VH, hidden, labels_BS, scale, z_loss):
    sizes = {"vocab_size": table_VH.shape[0], "hidden_size": table_VH.shape[1]}
    build, groups = build_of(rank, ranks, sequence, torch.float32, **sizes)
    region, head = build.region, build.head("h", (rank,), z_loss=z_loss, tied_to=None)
    head.weight.data.fill_(7.0)  # padded columns hold anything
    for box in head.weight.placement.boxes:
        box.view(head.weight.data).copy_(box.of(table_VH))
    if main:
        head.weight.main_grad = torch.zeros(head.weight.shape)
    part = cut(hidden, region).requires_grad_()
    loss = head.loss(part, labels_BS, scale)
    assert loss.dtype == torch.float64
    loss.backward()
    with torch.no_grad():
        again = head.loss(cut(hidden, region), labels_BS, scale)
    assert torch.equal(again, loss)
    slope = head.weight.main_grad if main else head.weight.grad
    padding = slope.clone()
    for box in head.weight.placement.boxes:
        box.view(padding).zero_()
    assert not padding.any()
    logits = head.logits(cut(hidden, region))
    groups.verify()
    return loss.detach(), part.grad, [box.view(slope).clone() for box in head.weight.placement.boxes], logits


@pytest.mark.parametrize("vocabulary", [3, 37])
@pytest.mark.parametrize("main", [True, False], ids=["main_grad", "autograd"])
@pytest.mark.parametrize(("ranks", "sequence"), REGIONS)
def test_head_and_loss(pool, ranks, sequence, main, vocabulary):
    table_VH, hidden = torch.randn(vocabulary, 5), torch.randn(12, 3, 5)
    labels_BS = torch.randint(vocabulary, (3, 12))
    labels_BS[torch.rand(3, 12) < 0.3] = IGNORE_INDEX
    labels_BS[0, 0] = vocabulary - 1  # the last true column
    results = pool.run(head_loss, ranks, ranks, sequence, main, table_VH, hidden, labels_BS, 0.3, 0.01)
    table, x = table_VH.double().requires_grad_(), hidden.double().requires_grad_()
    logits = functional.linear(x, table)
    flat, labels_N = logits.flatten(0, 1), labels_BS.t().flatten()
    valid = labels_N != IGNORE_INDEX
    loss = functional.cross_entropy(flat, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = 0.3 * (loss + 0.01 * (flat.logsumexp(-1).square() * valid).sum())
    slopes = torch.autograd.grad(loss, (x, table))
    near = {"rtol": 1e-4, "atol": 1e-5}
    for got, _, _, seen in results:
        torch.testing.assert_close(got, loss.detach(), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(seen.double(), logits.detach(), **near)
        assert torch.equal(got, results[0][0])
    torch.testing.assert_close(join([result[1] for result in results], sequence).double(), slopes[0], **near)
    total = torch.cat([rows for _, _, boxes, _ in results for rows in boxes])
    torch.testing.assert_close(total.double(), slopes[1], **near)


@pytest.mark.parametrize(("ranks", "sequence"), [(1, False), (2, True)])
def test_no_label_counts(pool, ranks, sequence):
    """All labels ignored: loss and gradients are exactly 0."""
    labels_BS = torch.full((3, 12), IGNORE_INDEX)
    results = pool.run(
        head_loss, ranks, ranks, sequence, True, torch.randn(37, 5), torch.randn(12, 3, 5), labels_BS, 1.0, 0.01
    )
    for loss, slope, rows, _ in results:
        assert loss == 0 and not slope.any() and not any(box.any() for box in rows)


@pytest.mark.parametrize("label", [37, 38, 1000, -1])
def test_label_outside_the_vocabulary_is_not_a_number(pool, label):
    """37 tokens on 2 ranks: column 37 is padding. Such a label makes the loss NaN on all ranks, which the trainer
    refuses, and never trains a padded column."""
    labels_BS = torch.randint(37, (3, 12))
    labels_BS[1, 4] = label
    hidden, table_VH = torch.randn(12, 3, 5), torch.randn(37, 5)
    for loss, *_ in pool.run(head_only_loss, 2, table_VH, hidden, labels_BS):
        assert loss.isnan()


def head_only_loss(rank, table_VH, hidden, labels_BS):
    sizes = {"vocab_size": table_VH.shape[0], "hidden_size": table_VH.shape[1]}
    build, groups = build_of(rank, 2, False, torch.float32, **sizes)
    head = build.head("h", (rank,), z_loss=0.0, tied_to=None)
    head.weight.data.fill_(7.0)
    for box in head.weight.placement.boxes:
        box.view(head.weight.data).copy_(box.of(table_VH))
    head.weight.main_grad = torch.zeros(head.weight.shape)
    loss = head.loss(hidden.clone().requires_grad_(), labels_BS, 1.0)
    padding = head.weight.main_grad[head.valid :]
    assert not padding.any()
    groups.verify()
    return (loss.detach(),)

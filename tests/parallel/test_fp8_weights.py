"""FP8 weights are cast once between two of their updates, and never outlive one."""

import pytest
import torch

from megalite.kernels import fp8, fp8_blocks
from megalite.optim.lr_schedule import learning_rate
from megalite.placement import PlacedParameter
from tests.support.parity import Case, Layout, assert_same_bits, build_trainer, micro_batches, train_virtually

SMALL = {
    "model.layers": 2,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 48,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.head_dim": 16,
    "train.precision": "bf16",
}
MATRICES = 4 * SMALL["model.layers"]  # query/key/value, output, gate/up, down


@pytest.fixture
def casts(monkeypatch):
    """The shapes of the weights that were cast."""
    shapes = []

    def count(module, name):
        plain = getattr(module, name)

        def counted(x_NK, *arguments, **options):
            shapes.append(tuple(x_NK.shape))
            return plain(x_NK, *arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(fp8, "fp8_cast_transpose")
    count(fp8_blocks, "fp8_cast_weight_blocks")
    return shapes


def trainer_of(kind, **fields):
    config = Case.of({**SMALL, "train.fp8": kind, **fields}).config(1)
    trainer = build_trainer(config, 0, 1)
    return trainer, lambda number: micro_batches(0, number, config, trainer.mesh, documents=False)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "recompute"),
    [*((kind, mode) for kind in ("tensor", "row") for mode in ("none", "selective", "full")), ("block", "selective")],
)
def test_once_a_step_whatever_the_number_of_micro_batches(casts, kind, recompute):
    trainer, batches = trainer_of(kind, **{"train.recompute": recompute})
    for number in (1, 4, 3):
        casts.clear()
        assert trainer.step(batches(number), 1e-3).accepted
        assert len(casts) == MATRICES
    casts.clear()
    trainer.evaluate(batches(2))  # after the update: once more, and then kept for the step
    trainer.step(batches(2), 1e-3)
    assert len(casts) == MATRICES


def three_steps(trainer, batches):
    losses = [trainer.step(batches(4), learning_rate(step, trainer.config)).loss for step in (1, 2)]
    losses += trainer.evaluate(batches(4))  # so that there is something kept to be outlived
    with torch.no_grad():
        trainer.fill(lambda parameter: parameter.mul_(0.5))  # as loading does
    losses += [*trainer.evaluate(batches(4)), trainer.step(batches(4), 1e-2).loss, *trainer.evaluate(batches(2))]
    return losses, [bucket.parameters.clone() for stage in trainer.buckets.values() for bucket in stage.buckets]


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_what_is_kept_is_what_would_be_cast_now(monkeypatch, kind):
    """The bits of training, loading and evaluation are those of a run that casts at every product."""
    losses, weights = three_steps(*trainer_of(kind))
    with monkeypatch.context() as patch:
        patch.setattr(PlacedParameter, "derived", lambda self, make: make())
        fresh_losses, fresh_weights = three_steps(*trainer_of(kind))
    assert losses == fresh_losses and losses[2] != losses[4]
    assert all(map(torch.equal, weights, fresh_weights))


@pytest.mark.fast
def test_a_weight_without_a_store_is_cast_at_every_product(casts):
    trainer, _ = trainer_of("row")
    weight = next(p for p in next(iter(trainer.stages.values())).parameters() if p.placement.role == "matrix")
    weight.store = None
    first = weight.derived(lambda: weight.detach().clone())
    weight.data.add_(1)
    assert not torch.equal(first, weight.derived(lambda: weight.detach().clone()))


def test_under_zero_3_the_same_bits():
    """Whole weights, and what was made of them, come and go there."""
    case = Case.of({**SMALL, "train.fp8": "row", "model.layers": 4}, steps=3)
    whole, sharded = (train_virtually(case, Layout(data=2, zero=zero), chaos=True) for zero in (2, 3))
    assert_same_bits(sharded, whole)

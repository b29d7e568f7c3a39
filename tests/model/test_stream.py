"""The last sum of a layer, left to the next layer's norm: the same bits, with one pass over memory less."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.placement import placed_parameters
from tests.support.parity import BASE, Case, build_trainer, micro_batches

LAYERS = BASE["model.layers"]
KINDS = {
    "pre_norm": ({}, 2 * LAYERS - 1),
    "multiplier": ({"model.residual_multiplier": 0.22, "model.embedding_multiplier": 12.0}, 2 * LAYERS - 1),
    "sandwich_norm": ({"model.block": "sandwich_norm", "model.zero_centered_norm": True}, 2 * LAYERS - 1),
    "reordered_norm": ({"model.block": "reordered_norm"}, 0),
    "parallel_block": ({"model.block": "docs.examples.parallel_block:ParallelBlock"}, 0),
    "experts": ({"model.experts": 4, "model.experts_per_token": 2, "model.dense_layers": (0,)}, 2 * LAYERS - 1),
    "adapter": ({"adapter.kind": "lora", "adapter.rank": 2}, 2 * LAYERS - 1),
    "selective": ({"train.recompute": "selective"}, 2 * LAYERS - 1),
    "full": ({"train.recompute": "full"}, LAYERS),
}


def trained(fields, sums_in_norms):
    """(gradients and weights after two steps, loss of each, sums in norms of one forward pass)."""
    config = Case.of({"kernels.default": "reference"} | fields).config(1)
    trainer = build_trainer(config, 0, 1)
    (stage,) = trainer.stages.values()
    assert stage.sums_in_norms
    stage.sums_in_norms = sums_in_norms
    calls = []
    for module in stage.modules():
        if hasattr(module, "add_and_norm"):
            kernels = module.kernels
            module.kernels = dataclasses.replace(
                kernels, add_rms_norm=lambda *args, kernels=kernels: (calls.append(1), kernels.add_rms_norm(*args))[1]
            )
    tokens_BS = torch.zeros(2, config.train.seq_length, dtype=torch.int64)
    stage(tokens_BS, stage.positions(config.train.seq_length))
    sums = len(calls)
    losses = [trainer.step(micro_batches(4 * step, 4, config, trainer.mesh, False), 1e-3).loss for step in range(2)]
    gradients = [p.main_grad.clone() for p in placed_parameters(stage) if p.main_grad is not None]
    return gradients, [p.detach().clone() for p in placed_parameters(stage)], losses, sums


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_sum_of_a_layer_in_the_next_norm_changes_no_bit(kind, precision):
    fields, sums = KINDS[kind]
    fields = fields | {"train.precision": precision}
    (gradients, weights, losses, count), apart = trained(fields, True), trained(fields, False)
    assert losses == apart[2]
    assert all(torch.equal(a, b) for a, b in zip(gradients, apart[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, apart[1], strict=True))
    assert (count, apart[3]) == (sums, LAYERS if sums else 0)

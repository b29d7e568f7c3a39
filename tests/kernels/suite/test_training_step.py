"""A whole training step with Triton kernels against the same step in plain PyTorch: loss, norm, gradients, weights."""

import pytest
import torch

from megalite.config import build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

VOCABULARY, LENGTH = 61, 9


def steps_with(choice, device, batches, precision):
    """(loss and norm of each of two steps, gradients of the second, weights after it)"""
    config = build_config(
        {
            "model": {
                "layers": 1,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "heads": 4,
                "kv_heads": 2,
                "vocab_size": VOCABULARY,
                "max_positions": LENGTH,
                "qk_norm": True,
            },
            "train": {
                "seq_length": LENGTH,
                "micro_batch_size": 2,
                "global_batch_size": 2,
                "precision": precision,
                "z_loss": 1e-3,
            },
            "optimizer": {"eps": 1e-5},
        }
    )
    trainer = Trainer(config, Mesh(device=device), select_kernels({"default": choice}, device))
    trainer.initialise()
    trainer.accumulate(batches)
    gradients = [segment.gradient.clone() for segment in trainer.optimizer.segments]
    numbers = [(result.loss, result.grad_norm) for result in (trainer.step(batches, 1e-3) for _ in range(2))]
    return numbers, gradients, [segment.master.detach().clone() for segment in trainer.optimizer.segments]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 6e-2)])
def test_kernels_train_as_the_references_do(device, precision, tolerance):
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1))
    labels = tokens[:, 1:].masked_fill(torch.rand(2, LENGTH) < 0.2, -100)
    batches = [Batch(tokens[:, :-1].to(device), labels.to(device))]
    ours, plain = (steps_with(choice, device, batches, precision) for choice in ("triton", "reference"))
    for (loss, norm), (plain_loss, plain_norm) in zip(ours[0], plain[0]):
        assert abs(loss - plain_loss) < tolerance * abs(plain_loss)
        assert abs(norm - plain_norm) < tolerance * plain_norm
    for mine, reference in zip((*ours[1], *ours[2]), (*plain[1], *plain[2])):
        assert (mine - reference).norm() <= tolerance * reference.norm()

"""Generation with its loop of tokens as a graph, by Triton's kernels: on a GPU a real one, elsewhere a tape."""

import pytest
import torch

from megalite.config import build_config
from megalite.cuda_graph import CudaRecorder
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer
from tests.support.tape import TapeRecorder

MODEL = {
    "layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_positions": 40,
    "sliding_window": 6,
}


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=3), Sampling(temperature=0), Sampling(0.8, 9, 0.9, seed=5)])
def test_tokens_of_a_graph_are_those_of_the_ordinary_loop(device, sampling):
    """Padded rows that end at different times, and a second run in the same buffers."""
    if device.type == "cpu" and sampling.temperature != 1:
        pytest.skip("slow in the interpreter, and nothing else for the kernels")
    config = build_config({"model": MODEL, "train": {"seq_length": 40, "precision": "fp32"}})
    trainer = Trainer(config, Mesh(device=device), select_kernels({"default": "triton"}, device))
    trainer.initialise()
    recorder = CudaRecorder(device) if device.type == "cuda" else TapeRecorder()
    with trainer.generating() as stages:
        usual, graphed = (
            Generator(stages, trainer.owners, trainer.mesh, config.model, graph=graph) for graph in (None, recorder)
        )
        for lengths, new in (((9, 2, 5), (6, 2, 4)), ((3,), (5,))):
            prompts = [[(7 * row + place) % 61 for place in range(length)] for row, length in enumerate(lengths)]
            limits = [Limits(count) for count in new]
            expected, got = (each.run(prompts, sampling, limits) for each in (usual, graphed))
            assert [row.new_ids for row in got] == [row.new_ids for row in expected]
            for mine, theirs in zip(got, expected):
                assert torch.tensor(mine.logprobs).allclose(torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)

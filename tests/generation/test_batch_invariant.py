"""`train.batch_invariant`: the sampler's log-probabilities are the trainer's to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import Config
from megalite.errors import UserError
from megalite.generation.generator import Completion, Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.batch_invariant import LEAST_COLUMNS, BatchInvariantAttention
from megalite.mesh import CPU, Mesh
from megalite.model.sharded import ShardedModel
from megalite.parallel.row_blocks import ROWS, RowBlocks
from tests.align import tiny
from tests.align.tiny import build_task, config_of
from tests.support.parity import Case, Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODEL: dict[str, Any] = {
    "run.seed": 3,
    "model.hidden_size": 60,
    "model.ffn_hidden_size": 101,
    "model.heads": 6,
    "model.kv_heads": 2,
    "model.head_dim": 10,
    "model.vocab_size": 211,
    "model.max_positions": 128,
    "model.qk_norm": True,
    "model.attention_bias": True,
    "model.tie_embeddings": True,
}


def config_with(exact: bool, fields: dict[str, Any]) -> Config:
    """A configuration of `objective.kind` next_token, which needs no prompts."""
    return tiny.replaced(Case.of(MODEL | fields).config(1), train={"batch_invariant": exact})


def model_of(exact: bool = True, **fields: Any) -> ShardedModel:
    """A model with weights large enough that no probability is near 1 / 211."""
    config = config_with(exact, {name.replace("__", "."): value for name, value in fields.items()})
    model = ShardedModel(config, Mesh(), select_kernels({}, CPU))
    model.initialise()
    model.fill(lambda parameter: parameter.mul_(6.0 if parameter.decays else 1.0))
    return model


def generate(model: ShardedModel, prompts: list[list[int]], batch: int, exact: bool = True) -> list[Completion]:
    limits = [Limits(random.randint(1, 40)) for _ in prompts]
    with model.generating() as stages:
        generator = Generator(stages, model.owners, model.mesh, model.config.model, trainer_logprobs=exact)
        return generator.run_all(prompts, Sampling(1.0, seed=5), limits, batch=batch, sampler_logprobs=True)


def in_training(model: ShardedModel, rows: list[list[int]], batch: int, padding: int) -> list[Tensor]:
    """Log-probabilities of every token but the first of each row, in batches padded on the right."""
    found = []
    (stage,) = model.stages.values()
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        length = max(map(len, part)) + padding
        tokens_BS = torch.tensor([row + [0] * (length - len(row)) for row in part])
        hidden = stage(tokens_BS, stage.positions(length))
        logprobs_BS = stage.logprobs(hidden, tokens_BS.roll(-1, 1))
        assert logprobs_BS.requires_grad
        found += [logprobs_BS[index, : len(row) - 1].detach() for index, row in enumerate(part)]
    return found


def differing(completions: list[Completion], logprobs: list[Tensor]) -> int:
    """Of how many generated tokens sampler and trainer disagree."""
    return sum(
        int((torch.tensor(own.logprobs) != row[len(own.prompt_ids) - 1 :]).sum())
        for own, row in zip(completions, logprobs, strict=True)
    )


def prompts_of(count: int) -> list[list[int]]:
    return [[random.randrange(211) for _ in range(random.randint(1, 23))] for _ in range(count)]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("window", [0, 9])
def test_generated_logprobs_are_those_of_training(precision: str, window: int) -> None:
    model = model_of(train__precision=precision, model__sliding_window=window)
    prompts = prompts_of(11)
    for batch in (1, 4, 11):
        completions = generate(model, prompts, batch)
        rows = [own.prompt_ids + own.new_ids for own in completions]
        for together, padding in ((11, 0), (3, 7), (1, 2)):
            assert differing(completions, in_training(model, rows, together, padding)) == 0


def test_without_it_they_differ() -> None:
    model = model_of(exact=False)
    completions = generate(model, prompts_of(11), 11, exact=False)
    rows = [own.prompt_ids + own.new_ids for own in completions]
    assert differing(completions, in_training(model, rows, 11, 0)) > 0


@pytest.mark.parametrize("precision", DTYPES)
def test_the_difference_in_a_run_is_zero(precision: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "run": {"device": "cpu"},
        "objective": {"kind": "grpo"},
        "rollout": {"prompts_per_step": 8, "answers": 2},
        "train": {"precision": precision, "batch_invariant": True},
    }
    results = tiny.train(build_task(config_of(Layout(), **sections), Layout(), 0, shortest=2), 2)
    assert [result.metrics["sampler_difference"] for result in results] == [0.0, 0.0]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_product_of_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    narrow = [(ROWS, random.randint(2, 120), outputs) for outputs in range(1, LEAST_COLUMNS)]
    for rows, inputs, outputs in ((1, 7, 5), (ROWS - 1, 100, 37), (2 * ROWS + 3, 24, 211), *narrow):
        x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
        whole = RowBlocks().output(x, weight, bias)
        plain = RowBlocks().output(x, weight, None)
        torch.testing.assert_close(plain, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=1e-2)
        assert torch.equal(whole, plain + bias)
        order = torch.randperm(rows)
        assert torch.equal(RowBlocks().output(x[order], weight, bias), whole[order])
        for row in random.sample(range(rows), min(rows, 5)):
            assert torch.equal(RowBlocks().output(x[row].expand(1, 1, -1), weight, bias)[0, 0], whole[row])


CALLS = [  # queries, batch, heads, kv heads, width, window, softcap
    (37, 3, 4, 2, 10, None, None),
    (70, 2, 6, 3, 16, 9, None),
    (5, 1, 4, 4, 8, None, 3.0),
    (29, 3, 3, 1, 5, None, None),
    (33, 4, 8, 2, 32, 40, None),
]


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_the_reference_with_its_gradients(call: Any, packed: bool, dtype: torch.dtype) -> None:
    length, batch, heads, kv_heads, width, window, softcap = call
    q, k, v = (
        torch.randn(length, batch, n, width, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    documents = (torch.rand(length, batch) < 0.1).cumsum(0) if packed else None
    options = {"window": window, "softcap": softcap, "documents": documents}
    grad = torch.randn(q.shape, dtype=dtype)
    attention = BatchInvariantAttention(select_kernels({}, CPU).attention_parts)
    ours, theirs = attention(q, k, v, **options), attention_reference(q, k, v, **options)
    assert isinstance(theirs, Tensor)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for one, other in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad)):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("call", CALLS)
def test_a_query_alone_behind_padding_attends_as_in_its_sequence(call: Any, dtype: torch.dtype) -> None:
    length, batch, heads, kv_heads, width, window, softcap = call
    q, k, v = (torch.randn(length, batch, n, width, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    attention = BatchInvariantAttention(select_kernels({}, CPU).attention_parts)
    whole = attention(q, k, v, window=window, softcap=softcap)
    for query in range(length):
        padding, row = random.randint(0, 50), slice(random.randrange(batch), None)
        more = torch.randn(2, padding, batch, kv_heads, width, dtype=dtype)
        keys, values = (torch.cat((more[index], x[: query + 1]))[:, row] for index, x in enumerate((k, v)))
        documents = torch.cat((torch.zeros(padding), torch.ones(query + 1)))[:, None].expand(-1, keys.shape[1])
        alone = attention(q[query : query + 1, row], keys, values, window=window, softcap=softcap, documents=documents)
        assert torch.equal(alone, whole[query : query + 1, row])


@pytest.mark.fast
def test_kernels_that_mix_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs the compiled kernels, and kernels\.swiglu is reference; install them"):
        ShardedModel(config_with(True, {}), Mesh(), select_kernels({"swiglu": "reference"}, CPU))

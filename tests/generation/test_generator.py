"""Generation with a key/value cache: transformers' greedy tokens in every layout, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.source import load_weights
from megalite.errors import RunFailed, UserError
from megalite.generation.cache import Memory
from megalite.generation.generator import Completion, Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.parallel.context import ContextRegion
from megalite.text.tokenizers import ByteTokenizer
from tests.fixtures import golden
from tests.support.pool import Pool

GREEDY = Sampling(temperature=0)
SHARED = ("llama3_gqa", "llama_tied_mha", "mistral_swa", "olmo2_reordered", "gemma3_two_bases")
"""Models for the layouts: a key/value head on two tensor ranks, tied embeddings on two stages, one key/value head,
norms over all heads, windows in some layers."""


def _generator(name: str, rank: int = 0, mode: str = "gather", **layout: int) -> Generator:
    mesh = Mesh(rank=rank, **layout)
    with HuggingFaceSource(golden.folder(name)) as source:
        kernels = select_kernels({}, golden.CPU)
        context = ContextRegion.of(mesh, mode, 1)
        stage = Stage(source.model, mesh, kernels, stage=mesh.index("pp"), owners=range(mesh.pp), context=context)
        load_weights([stage], source)
        return Generator({stage.stage: stage}, range(mesh.pp), mesh, source.model)


def _rows(completions: list[Completion]) -> list[list[int]]:
    return [completion.prompt_ids + completion.new_ids for completion in completions]


def _ragged_prompts(name: str) -> list[list[int]]:
    """Prompts of odd lengths, one of a single token, some longer than the sliding window."""
    ids = golden.golden(name)["input_ids"]
    return [ids[0, :11].tolist(), ids[1, :1].tolist(), ids[2, :20].tolist(), ids[1, 3:8].tolist()]


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.NAMES)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    expected = golden.golden(name)
    new = expected["greedy"].shape[1] - expected["prompts"].shape[1]
    completions = _generator(name).run(expected["prompts"].tolist(), GREEDY, Limits(new))
    assert _rows(completions) == expected["greedy"].tolist()
    assert {completion.reason for completion in completions} == {"length"}


def _generate(rank: int, layout: dict[str, Any]) -> list[Any]:
    results = []
    for name in SHARED:
        generator, expected = _generator(name, rank, **layout), golden.golden(name)
        results.append(_rows(generator.run(expected["prompts"].tolist(), GREEDY, Limits(9))))
        results.append(_rows(generator.run(_ragged_prompts(name), Sampling(0.9, 30, 0.95, 7), Limits(5))))
    return results


@pytest.mark.parametrize(
    "layout",
    [{"pp": 3}, {"tp": 2, "pp": 2}, {"cp": 2, "pp": 2}, {"cp": 3, "mode": "ring"}, {"cp": 2, "mode": "ulysses"}],
    ids=str,
)
def test_layouts_agree(pool: Pool, layout: dict[str, Any]) -> None:
    """Greedy and sampled tokens on tensor, pipeline and context ranks; all ranks get all of them."""
    world_size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    alone = _generate(0, {})
    assert alone[::2] == [golden.golden(name)["greedy"][:, :17].tolist() for name in SHARED]
    for result in pool.run(_generate, world_size, layout):
        assert result == alone


def _greedy(rank: int, name: str, layout: dict[str, Any]) -> list[list[int]]:
    generator = _generator(name, rank, **layout)
    return _rows(generator.run(golden.golden(name)["prompts"].tolist(), GREEDY, Limits(6)))


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"cp": 2}, {"cp": 2, "mode": "ulysses"}], ids=str)
def test_latents_on_ranks(pool: Pool, layout: dict[str, Any]) -> None:
    """Every tensor rank caches the latents of all tokens, every context rank those of its own."""
    expected = golden.golden("deepseek3_experts")["greedy"][:, :14].tolist()
    world_size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    assert pool.run(_greedy, world_size, "deepseek3_experts", layout) == [expected] * world_size


@pytest.mark.parametrize("name", ["mixtral_experts", "dots1_experts", "deepseek2_experts"])
def test_experts_on_two_ranks(pool: Pool, name: str) -> None:
    """Both ranks read the same prompts and get the same tokens, through experts of which each has half."""
    expected = golden.golden(name)["greedy"][:, :14].tolist()
    assert pool.run(_greedy, 2, name, {"ep": 2}) == [expected, expected]


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.NAMES)
def test_a_row_does_not_see_the_others(name: str) -> None:
    """A ragged batch gives each row the tokens and probabilities that it has alone."""
    generator, prompts = _generator(name), _ragged_prompts(name)
    together = generator.run(prompts, GREEDY, Limits(12))
    for prompt, row in zip(prompts, together):
        (alone,) = generator.run([prompt], GREEDY, Limits(12))
        assert alone.new_ids == row.new_ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(row.logprobs), atol=2e-5, rtol=0)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["llama3_gqa", "deepseek3_experts"])
def test_log_probabilities_are_those_of_the_whole_sequence(name: str) -> None:
    """At temperature 1, and also where the sampling is sharper."""
    generator = _generator(name)
    for completion in generator.run(_ragged_prompts(name), Sampling(0.5, 7, 0.9, 3), Limits(9)):
        ids = torch.tensor([completion.prompt_ids + completion.new_ids])
        stage = generator.stages[0]
        logits_SV = stage.logits(stage(ids, stage.positions(ids.shape[1])))[:, 0]
        whole = logits_SV.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[-9:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), whole, atol=2e-5, rtol=0)


@pytest.mark.fast
def test_the_seed_decides() -> None:
    """The same seed repeats, another differs, and a row's stream does not depend on how many rows there are."""
    generator, prompts = _generator("llama_yarn"), _ragged_prompts("llama_yarn")
    first = _rows(generator.run(prompts, Sampling(1.0, seed=5), Limits(16)))
    assert _rows(generator.run(prompts, Sampling(1.0, seed=5), Limits(16))) == first
    assert _rows(generator.run(prompts, Sampling(1.0, seed=6), Limits(16))) != first
    assert _rows(generator.run(prompts[:2], Sampling(1.0, seed=5), Limits(16))) == first[:2]
    same = _rows(generator.run([prompts[0]] * 3, Sampling(1.0, seed=5), Limits(16)))
    assert len({tuple(row) for row in same}) == 3


@pytest.mark.fast
def test_any_number_of_prompts_in_batches() -> None:
    """Longest first and a few at a time: the completions of one batch, in the given order; each row has its limits."""
    generator, name = _generator("llama_yarn"), "llama_yarn"
    prompts = _ragged_prompts(name) * 2
    limits = [Limits(number, frozenset(range(9))) for number in (0, 9, 1, 12, 12, 0, 3, 7)]
    whole = generator.run(prompts, Sampling(1.0, seed=9), limits, rows=range(100, 108))
    assert [len(completion.new_ids) for completion in whole][:1] == [0]
    assert {completion.reason for completion in whole} == {"length", "token"}
    told: list[int] = []
    for batch in (1, 3, 8):
        parts = generator.run_all(
            prompts, Sampling(1.0, seed=9), limits, batch=batch, rows=range(100, 108), progress=told.append
        )
        assert _rows(parts) == _rows(whole)
        assert [part.reason for part in parts] == [completion.reason for completion in whole]
    assert told == [1, 2, 3, 4, 5, 6, 7, 8, 3, 6, 8, 8]
    assert generator.run([], GREEDY, Limits(3)) == generator.run_all([], GREEDY, Limits(3)) == []


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.NAMES)
def test_a_memory_spares_what_is_cached(name: str) -> None:
    """A conversation that grows, changes its end and begins anew: the tokens of runs without a memory; only what is
    new goes through the model."""
    generator, memory = _generator(name), Memory()
    stage, lengths = generator.stages[0], []
    stage.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    ids = golden.golden(name)["input_ids"].flatten().tolist()
    talk = ids[:9]
    for prompt, computed in ((talk, 9), (None, 6), (talk, 1), ([*ids[:7], 5, 6], 2), (ids[3:40], 37)):
        talk = prompt if prompt is not None else [*talk, *ids[20:25]]
        (alone,) = generator.run([talk], Sampling(0.8, seed=2), Limits(6))
        lengths.clear()
        (again,) = generator.run([talk], Sampling(0.8, seed=2), Limits(6), memory=memory)
        assert again.new_ids == alone.new_ids
        assert lengths[0] == computed
        talk = [*talk, *again.new_ids]


@pytest.mark.fast
def test_a_memory_holds_nothing_of_a_prompt_that_was_not_computed() -> None:
    generator, memory, prompt = _generator("llama3_gqa"), Memory(), [5, 6, 7]
    (before,) = generator.run([prompt], GREEDY, Limits(0), memory=memory)
    assert (before.new_ids, before.reason, memory.ids) == ([], "length", [])
    assert generator.run([prompt], GREEDY, Limits(4), memory=memory) == generator.run([prompt], GREEDY, Limits(4))


@pytest.mark.fast
def test_an_interruption_ends_all_rows() -> None:
    generator, asked = _generator("mistral_swa"), []

    def interrupt() -> bool:
        asked.append(1)
        return len(asked) == 3

    rows = generator.run([[1, 2], [3]], GREEDY, [Limits(9), Limits(2)], ByteTokenizer(), interrupt=interrupt)
    assert [(len(row.new_ids), row.reason) for row in rows] == [(3, "interrupted"), (2, "length")]
    assert rows[0].text == ByteTokenizer().decode(rows[0].new_ids)


@pytest.mark.fast
def test_the_host_may_look_seldom() -> None:
    """As on a GPU: rows that end between two looks get the same tokens and texts, and no more."""
    generator, prompts = _generator("mistral_swa"), _ragged_prompts("mistral_swa")
    limits = [Limits(number, frozenset(range(5)), ("a",)) for number in (19, 5, 16, 11)]
    results = []
    for generator.look_every in (1, 3, 8, 100):
        results.append(generator.run(prompts, Sampling(1.2, seed=1), limits, ByteTokenizer()))
        for other in results:
            assert [(row.new_ids, row.text, row.reason) for row in other] == [
                (row.new_ids, row.text, row.reason) for row in results[0]
            ]
    assert len({len(row.new_ids) for row in results[0]}) > 1


@pytest.mark.fast
def test_outputs_that_are_not_finite_end_the_run() -> None:
    generator = _generator("llama3_gqa")
    generator.stages[0].norm.weight.data[3] = float("nan")
    with pytest.raises(RunFailed, match="prompt 1, new token 1: the model's outputs are not finite"):
        generator.run([[1, 2]], GREEDY, Limits(4))


@pytest.mark.fast
def test_a_stop_token_ends_its_row_only() -> None:
    generator, expected = _generator("qwen2_bias"), golden.golden("qwen2_bias")["greedy"]
    stop = int(expected[1, 12])
    completions = generator.run(expected[:, :8].tolist(), GREEDY, Limits(20, frozenset({stop})))
    for row, completion in zip(expected[:, 8:].tolist(), completions):
        if stop in row:
            assert completion.new_ids == row[: row.index(stop) + 1]
            assert completion.reason == "token"
        else:
            assert (completion.new_ids, completion.reason) == (row, "length")
    assert completions[1].reason == "token"


@pytest.mark.fast
def test_a_stop_string_ends_the_text_before_it() -> None:
    """Text streamed to a listener adds up to the completion's, and never shows a part of the stop string."""
    generator, tokenizer = _generator("mistral_swa"), ByteTokenizer()
    prompt = list(b"megalite")
    prompts = [[token % 101 for token in prompt]]
    (whole,) = generator.run(prompts, GREEDY, Limits(24), tokenizer)
    assert len(whole.text) > 10
    stop = whole.text[7:10]
    pieces: list[str] = []
    limits = Limits(24, stop_strings=("never", stop))
    (cut,) = generator.run(prompts, GREEDY, limits, tokenizer, lambda row, piece: pieces.append(piece))
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.reason == "string"
    assert "".join(pieces) == cut.text
    assert len(cut.new_ids) < len(whole.new_ids)


@pytest.mark.fast
def test_what_does_not_fit_is_refused() -> None:
    generator = _generator("mistral_swa")
    with pytest.raises(UserError, match=r"prompt 2 has 100 tokens; .*max-new-tokens = 29.*max_positions = 128"):
        generator.run([[1], [1] * 100], GREEDY, Limits(29))
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generator.run([[1], []], GREEDY, Limits(1))
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        generator.run([[1]], GREEDY, Limits(1, stop_strings=("x",)))

"""What the service answers, in every layout: the definition, written out with transformers one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.checkpoint.source import fill_model
from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.evaluation.request_packing import collect, pack
from megalite.evaluation.service import Service, serving
from megalite.generation.loading import open_checkpoint
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from tests.evaluation.support import EOS, make_checkpoint
from tests.fixtures import golden
from tests.support.pool import Pool

LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}]
POSITIONS, VOCABULARY = 96, 101
Requests = list[tuple[list[int], list[int]]]


def ask(rank: int, layout: dict[str, int], folder: str, call: Callable[[Service], Any]) -> Any:
    """The result of `call` on rank 0 of a layout; None on the others."""
    mesh = Mesh(rank=rank, **layout)
    with open_checkpoint(folder) as opened:
        parallel = {"tensor": mesh.tp, "pipeline": mesh.pp, "context": mesh.cp, "sequence": False}
        config = golden.training_config(ModelConfig(**opened.model), **parallel)
        model = ShardedModel(config, mesh, select_kernels({}, golden.CPU), trained=False)
        fill_model(model, opened.source)
        with serving(model, opened.tokenizer, batch_size=3) as service:
            return None if service is None else call(service)


def in_layout(pool: Pool, layout: dict[str, int], folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    size = int(np.prod(list(layout.values()) or [1]))
    results = pool.run(_call, size, layout, str(folder), function, arguments)
    assert results[1:] == [None] * (size - 1)
    return results[0]


def _call(rank: int, layout: dict[str, int], folder: str, function: Callable[..., Any], arguments: Any) -> Any:
    return ask(rank, layout, folder, lambda service: function(service, *arguments))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("service") / "model", positions=POSITIONS)


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def make_requests() -> Requests:
    """180 requests: of odd lengths, too long, with equal inputs, twice the same, and greedy continuations."""
    random = np.random.default_rng()

    def ids(least: int, most: int) -> list[int]:
        return random.integers(3, VOCABULARY, size=random.integers(least, most + 1)).tolist()

    requests = [(ids(1, 130), ids(1, 30)) for _ in range(120)]
    requests += [(requests[number][0], [label]) for number in range(10) for label in (5, 6, 7, 8)]
    requests += [requests[number] for number in range(10)]
    return requests + [(ids(1, 1), ids(POSITIONS, POSITIONS)) for _ in range(10)]


@torch.no_grad()
def definition(peer: Any, requests: Requests) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in requests:
        ids = (context + continuation)[-(POSITIONS + 1) :]
        logits_SV = peer(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :]
        labels = torch.tensor(continuation)
        logprobs = logits_SV.log_softmax(-1).gather(1, labels[:, None]).sum().item()
        found.append((logprobs, bool((logits_SV.argmax(-1) == labels).all())))
    return found


def greedy(peer: Any, prompt: list[int], count: int) -> list[int]:
    return peer.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1)[0].tolist()


def likelihoods(service: Service, requests: Requests) -> tuple[list[tuple[float, bool]], int]:
    return service.loglikelihoods(requests), service.cut


@pytest.mark.parametrize("layout", [*LAYOUTS, {"cp": 2, "pp": 2}, {"ep": 2, "dp": 2}], ids=str)
def test_loglikelihoods(pool: Pool, checkpoint: Path, peer: Any, layout: dict[str, int]) -> None:
    """Sums, greedy flags, cut contexts; equal requests have equal bits wherever they were asked."""
    requests = make_requests()
    for prompt in [[7, 8, 9], [40] * 20]:
        ids = greedy(peer, prompt, 6)
        requests += [(ids[:-6], ids[-6:]), (ids[:-6], [*ids[-6:-1], (ids[-1] + 1) % VOCABULARY])]
    found, cut = in_layout(pool, layout, checkpoint, likelihoods, requests)
    expected = definition(peer, requests)
    assert np.abs([one - two for (one, _), (two, _) in zip(found, expected)]).max() < 1e-4
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert [flag for _, flag in found[-4:]] == [True, False, True, False]
    assert found[160:170] == found[:10]
    assert cut == sum(len(context) + len(more) > POSITIONS + 1 for context, more in requests) > 0


def rolling(service: Service, texts: list[list[int]]) -> list[float]:
    return service.rolling(texts, 1)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}, {"dp": 4}], ids=str)
def test_rolling(pool: Pool, checkpoint: Path, peer: Any, layout: dict[str, int]) -> None:
    """Texts around the windows' edges; every token once, with as much context as the model reads."""
    random = np.random.default_rng()
    lengths = (1, 2, POSITIONS - 1, POSITIONS, POSITIONS + 1, 2 * POSITIONS, 300, 0)
    texts = [random.integers(3, VOCABULARY, size=length).tolist() for length in lengths]
    expected = []
    for text in texts:
        windows = [([1, *text][: min(len(text), POSITIONS)], min(len(text), POSITIONS))] if text else []
        for start in range(POSITIONS, len(text), POSITIONS):
            stop = min(start + POSITIONS, len(text))
            windows.append(([1, *text][stop - POSITIONS : stop], stop - start))
        total, done = 0.0, 0
        for ids, count in windows:
            with torch.no_grad():
                logits_SV = peer(torch.tensor([ids])).logits[0, -count:]
            labels = torch.tensor(text[done : done + count])
            total, done = total + logits_SV.log_softmax(-1).gather(1, labels[:, None]).sum().item(), done + count
        expected.append(total)
    found = in_layout(pool, layout, checkpoint, rolling, texts)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert found[-1] == 0.0


def texts_of(service: Service, prompts: list[list[int]], stops: list[str], temperature: float) -> list[str]:
    return service.generate(prompts, Sampling(temperature, seed=3), 12, stops, [EOS])


@pytest.mark.parametrize("layout", [*LAYOUTS, {"cp": 2, "tp": 2}, {"ep": 2, "dp": 2}], ids=str)
def test_greedy_texts(pool: Pool, checkpoint: Path, peer: Any, layout: dict[str, int]) -> None:
    """Prompts of any length, too long ones among them; stop strings cut."""
    random = np.random.default_rng()
    prompts = [random.integers(3, 90, size=size).tolist() for size in (1, 5, 17, 40, 80, 84, 85, 120, 3, 3)]
    with open_checkpoint(checkpoint) as opened:
        tokenizer = opened.require_tokenizer("")
        expected = []
        for prompt in prompts:
            prompt = prompt[-(POSITIONS - 12) :]
            new = greedy(peer, prompt, 12)[len(prompt) :]
            new = new[: new.index(EOS)] if EOS in new else new
            expected.append(tokenizer.decode(new))
    assert in_layout(pool, layout, checkpoint, texts_of, prompts, [], 0.0) == expected
    stop = next(text for text in expected if len(text) > 4)[2:4]
    cut = [text.split(stop)[0] for text in expected]
    assert in_layout(pool, layout, checkpoint, texts_of, prompts, [stop], 0.0) == cut


def test_draws_do_not_depend_on_the_layout(pool: Pool, checkpoint: Path) -> None:
    """What is drawn for a prompt depends on the seed and its number alone; equal prompts draw apart."""
    prompts = [[7, 8, 9]] * 4 + [[20] * size for size in (3, 30, 11)]
    alone = ask(0, {}, str(checkpoint), lambda service: texts_of(service, prompts, [], 1.0))
    assert len(set(alone[:4])) == 4
    for layout in ({"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}):
        assert in_layout(pool, layout, checkpoint, texts_of, prompts, [], 1.0) == alone


@pytest.mark.fast
def test_requests_that_cannot_be(checkpoint: Path) -> None:
    def refused(call: Callable[[Service], Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            ask(0, {}, str(checkpoint), call)

    refused(lambda service: service.loglikelihoods([([1], [3] * (POSITIONS + 1))]), "97 tokens is longer than .* = 96")
    refused(lambda service: service.loglikelihoods([([1, 101], [3])]), "token id 101 .* model.vocab_size = 101")
    refused(lambda service: service.loglikelihoods([([1], [3, 101])]), "token id 101 .* model.vocab_size = 101")
    refused(lambda service: service.generate([[5]], Sampling(0.0), POSITIONS), "96 new tokens leave no room")
    assert ask(0, {}, str(checkpoint), lambda service: service.loglikelihoods([])) == []


def failing(service: Service) -> None:
    service.loglikelihoods([([1], [2])])
    raise RuntimeError("rank 0 has had enough")


def test_a_failure_on_rank_0_ends_the_others(pool: Pool, checkpoint: Path) -> None:
    """They do not wait for ever: the others leave at once, with exit code 2."""
    outcomes = pool.run(_outcome, 4, {"tp": 2, "dp": 2}, str(checkpoint))
    assert outcomes == ["RuntimeError", "SystemExit 2", "SystemExit 2", "SystemExit 2"]


def _outcome(rank: int, layout: dict[str, int], folder: str) -> str:
    try:
        ask(rank, layout, folder, failing)
    except SystemExit as leaving:
        return f"SystemExit {leaving.code}"
    except RuntimeError:
        return "RuntimeError"
    return "no error"


@pytest.mark.fast
def test_rows_are_filled() -> None:
    """Every document in one row, none too full; documents of one input share it; free positions are few."""
    random = np.random.default_rng()
    requests = [
        (random.integers(50, size=random.integers(1, 90)).tolist(), random.integers(50, size=2).tolist())
        for _ in range(300)
    ]
    requests += [(context, [more[0], label]) for context, more in requests[:50] for label in range(4)]
    work = collect(requests, 1000)
    assert len(work.documents) == len({tuple(c + m[:1]) for c, m in requests}) <= 300
    lengths = [len(document.input) for document in work.documents]
    for ranks in (1, 2, 3, 8):
        length, rows = pack(lengths, ranks, 1024)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        assert all(sum(lengths[number] for number in row) <= length for row in rows)
        assert length % 64 == 0 and -(-len(rows) // ranks) * ranks * length <= 1.15 * sum(lengths) + 64 * ranks
    assert pack([3, 4], 2, 1024) == (64, [[1, 0]])
    assert pack([2000, 3], 4, 1024) == (2048, [[0, 1]])
    length, rows = pack([570] * 48, 2, 4096)
    assert len(rows) == 8 and {len(row) for row in rows} == {6}

"""Sampling draws from exactly the distribution that temperature, top-k and top-p define; texts stop in time."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.errors import UserError
from megalite.generation.sampling import Sampling, sample, uniforms
from megalite.generation.stopping import TextStream
from megalite.text.tokenizers import ByteTokenizer

pytestmark = pytest.mark.fast


def _definition(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution, token by token, from the definitions."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order[:top_k] if top_k else order
    p = weights / weights[kept].sum()
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += p[token]
    result = np.zeros_like(weights)
    result[nucleus] = p[nucleus] / p[nucleus].sum()
    return result


@pytest.mark.parametrize("size", [37, 1024, 1531], ids="{} tokens".format)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.7), (3.0, 0, 0.9), (0.8, 9, 0.5), (0.8, 10**6, 0.9)],
)
def test_the_distribution(temperature: float, top_k: int, top_p: float, size: int) -> None:
    """Evenly spaced uniform numbers hit every token as often as its probability says, and the probability returned is
    that of the model or of the sampler."""
    logits = (np.random.default_rng().normal(size=size) * 2).astype(np.float32)
    count = 4000
    evenly_B = torch.from_numpy((np.arange(count) + 0.5) / count)
    logits_BV = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    sampling = Sampling(temperature, top_k, top_p)
    chosen_B, logprobs_B = sample(logits_BV, sampling, evenly_B, sampler_logprobs=True)
    frequency = np.bincount(chosen_B.numpy(), minlength=size) / count
    expected = _definition(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(frequency, expected, atol=1.5 / count)
    np.testing.assert_allclose(logprobs_B.exp(), expected[chosen_B], atol=2e-6)
    again_B, model_B = sample(logits_BV, sampling, evenly_B)
    assert torch.equal(again_B, chosen_B)
    np.testing.assert_allclose(model_B.exp(), _definition(logits, 1.0, 0, 1.0)[chosen_B], atol=2e-6)


def test_rows_have_their_own_logits_and_numbers() -> None:
    """Also where rows need differently many of the likeliest tokens for their nucleus."""
    logits_BV = torch.randn(7, 1100) * torch.tensor([9.0, 0.01, 3, 0.2, 1, 0, 20]).unsqueeze(1)
    numbers_B = torch.rand(7, dtype=torch.float64)
    for sampling in (Sampling(1.0), Sampling(0.7, top_p=0.95), Sampling(1.2, top_k=40, top_p=0.9)):
        together = torch.stack(sample(logits_BV, sampling, numbers_B))
        each = [torch.stack(sample(logits_BV[[row]], sampling, numbers_B[[row]]))[:, 0] for row in range(7)]
        assert torch.equal(together, torch.stack(each, dim=1))


def test_the_smallest_nucleus_is_one_token() -> None:
    logits_BV = torch.randn(8, 50)
    for sampling in (Sampling(1.0, top_p=1e-9), Sampling(1.0, top_k=1), Sampling(0.0)):
        chosen_B, logprobs_B = sample(logits_BV, sampling, torch.full((8,), 0.999).double(), sampler_logprobs=True)
        assert torch.equal(chosen_B, logits_BV.argmax(-1))
        assert torch.equal(logprobs_B, torch.zeros(8))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 2.3e-308, 1e-300, 1e-30])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.5), (10**9, 1e-300)])
def test_tiny_temperatures_take_the_likeliest_token(temperature: float, top_k: int, top_p: float) -> None:
    logits_BV = torch.randn(8, 50) * 1e4
    numbers_B = torch.tensor([0.0, 0.999] * 4).double()
    chosen_B, logprobs_B = sample(logits_BV, Sampling(temperature, top_k, top_p), numbers_B)
    assert torch.equal(chosen_B, logits_BV.argmax(-1))
    assert logprobs_B.isfinite().all()


def test_nothing_is_sorted_where_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens then stand in the order of their ids; one without any probability is never drawn, even at the end."""
    for name in ("sort", "topk"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("sorted"))
    for before, after in ((1, 1), (600, 0), (0, 512), (1023, 1025)):
        logits_V = torch.tensor([-1e9] * before + [0.0, 0.0] + [-1e9] * after)
        chosen_B, _ = sample(logits_V.expand(3, -1), Sampling(1.0), torch.tensor([0.0, 0.5, 1.0]).double())
        assert chosen_B.tolist() == [before, before + 1, before + 1]


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(0.8)], ids=lambda s: f"T={s.temperature}")
def test_a_large_vocabulary_costs_little(sampling: Sampling) -> None:
    """64 rows of Llama 3's vocabulary: at most 100 ms of CPU a token, temperature and log-probability included."""
    logits_BV, numbers_B, seconds = torch.randn(64, 128_256), torch.rand(64).double(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(4):
        start = time.process_time()
        sample(logits_BV, sampling, numbers_B)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < 0.1


def test_outputs_that_are_not_finite_show_in_the_log_probability() -> None:
    for broken in (float("nan"), float("inf")):
        logits_BV = torch.randn(2, 700)
        logits_BV[1, 650] = broken
        for sampling in (Sampling(0.0), Sampling(1.0), Sampling(0.7), Sampling(1.0, top_k=9), Sampling(1.0, top_p=0.9)):
            for sampler in (False, True):
                chosen_B, logprobs_B = sample(
                    logits_BV, sampling, torch.tensor([0.3, 0.6]).double(), sampler_logprobs=sampler
                )
                assert logprobs_B.isfinite().tolist() == [True, False], (broken, sampling)
                assert 0 <= int(chosen_B[1]) < 700


def test_a_number_is_drawn_without_those_before() -> None:
    """Whatever is asked for with it: other rows, other positions."""
    whole = uniforms(2**63 + 5, [0, 7, 2**40], 0, 100)
    for first, count in ((0, 1), (3, 9), (50, 2), (99, 1)):
        assert np.array_equal(uniforms(2**63 + 5, [2**40, 0], first, count), whole[[2, 0], first : first + count])
    assert not np.array_equal(uniforms(2**63 + 6, [0], 0, 100), whole[:1])


def test_numbers_are_uniform_and_independent() -> None:
    numbers = uniforms(11, range(64), 0, 200).T
    assert 0.47 < numbers.mean() < 0.53
    assert len(np.unique(numbers)) == numbers.size
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1.0, float("nan"), float("inf"))),
        *(("top_p", value) for value in (0.0, 1.5, float("nan"))),
        *(("top_k", -1), ("seed", -2), ("seed", 1 << 64)),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field.replace("_", "-")):
        Sampling(**{field: value})


@given(st.text(alphabet="abé\n", max_size=60), st.lists(st.text(alphabet="abé\n", min_size=1, max_size=4), max_size=3))
def test_a_text_stops_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """Byte by byte: nothing of the earliest stop string is ever shown, and everything before it is."""
    stream, shown = TextStream(ByteTokenizer(), stops), ""
    for token in text.encode():
        shown += stream.feed(token)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == stream.text == text
        return
    # The string that is complete first ends the text; of those complete at once, the one that began first.
    first = min(ends)
    begins = min(text.find(stop) for stop in stops if stop in text and text[:first].endswith(stop))
    assert shown == stream.text == text[:begins]
    assert stream.stopped

"""Sampling draws from exactly the distribution that temperature, top-k and top-p define; texts stop in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalite.errors import UserError
from megalite.generation.sampling import RowStreams, Sampling, sample
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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.7), (0.8, 9, 0.5)]
)
def test_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Evenly spaced uniform numbers hit every token as often as its probability says."""
    logits = np.random.default_rng().normal(size=37) * 2
    count = 4000
    uniforms = ((np.arange(count) + 0.5) / count).tolist()
    logits_BV = torch.tensor(logits, dtype=torch.float64).expand(count, -1)
    chosen = sample(logits_BV, Sampling(temperature, top_k, top_p), uniforms)
    frequency = np.bincount(chosen.numpy(), minlength=37) / count
    np.testing.assert_allclose(frequency, _definition(logits, temperature, top_k, top_p), atol=1.5 / count)


def test_rows_have_their_own_logits_and_numbers() -> None:
    logits_BV = torch.randn(5, 11)
    uniforms = RowStreams(3, 5).next()
    together = sample(logits_BV, Sampling(1.0), uniforms)
    each = [sample(logits_BV[row : row + 1], Sampling(1.0), uniforms[row : row + 1]).item() for row in range(5)]
    assert together.tolist() == each


def test_the_smallest_nucleus_is_one_token() -> None:
    logits_BV = torch.randn(8, 50)
    assert torch.equal(sample(logits_BV, Sampling(1.0, top_p=1e-9), [0.999] * 8), logits_BV.argmax(-1))
    assert torch.equal(sample(logits_BV, Sampling(1.0, top_k=1), [0.999] * 8), logits_BV.argmax(-1))
    assert torch.equal(sample(logits_BV, Sampling(0.0), [0.999] * 8), logits_BV.argmax(-1))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 2.3e-308, 1e-300, 1e-30])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.5), (10**9, 1e-300)])
def test_tiny_temperatures_take_the_likeliest_token(temperature: float, top_k: int, top_p: float) -> None:
    logits_BV = torch.randn(8, 50) * 1e4
    chosen = sample(logits_BV, Sampling(temperature, top_k, top_p), [0.0, 0.999] * 4)
    assert torch.equal(chosen, logits_BV.argmax(-1))


def test_nothing_is_sorted_where_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens then stand in the order of their ids; one without any probability is never drawn, even at the end."""
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_, **__: pytest.fail("sorted"))
    logits_BV = torch.tensor([[-1e9, 0.0, 0.0, -1e9]]).expand(3, -1)
    assert sample(logits_BV, Sampling(1.0), [0.0, 0.5, 1.0]).tolist() == [1, 2, 2]


def test_streams_are_uniform_and_independent() -> None:
    streams = RowStreams(11, 64)
    numbers = np.array([streams.next() for _ in range(200)])
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

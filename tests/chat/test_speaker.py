"""Rank 0 of a conversation, and a rank that follows it."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megalite.chat import speaker as module
from megalite.chat.speaker import Prompt, Speaker
from megalite.generation.generator import Completion, Limits
from megalite.generation.sampling import Sampling
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.fast


class _Generator:
    """Writes down how it was asked to draw."""

    model = SimpleNamespace(max_positions=64)
    mesh = None

    def __init__(self) -> None:
        self.asked: list[tuple[Sampling, list[int]]] = []

    def run(self, prompts: Any, sampling: Sampling, *_: Any, rows: list[int], **__: Any) -> list[Completion]:
        self.asked.append((sampling, rows))
        return [Completion(prompts[0])]


def test_all_ranks_draw_with_the_seed_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process may have chosen its own, and copies of the model that share experts draw for themselves."""
    sent: queue.SimpleQueue[tuple[dict[str, Any], np.ndarray]] = queue.SimpleQueue()
    channel = SimpleNamespace(
        send=lambda *message: sent.put(message), receive=lambda: sent.get(timeout=PATIENCE_SECONDS)
    )
    monkeypatch.setattr(module, "Channel", lambda mesh: channel)
    generators = [_Generator(), _Generator()]
    first, other = (
        Speaker(cast(Any, generator), cast(Any, None), cast(Any, None), Sampling(0.7, seed=seed), Limits(4))
        for generator, seed in zip(generators, (1 << 63, 2))
    )
    for _ in range(2):
        first.answer(Prompt([5, 6], 0), lambda piece: None, threading.Event())
    first.leave()
    other.follow()
    assert generators[0].asked == generators[1].asked == [(Sampling(0.7, seed=1 << 63), [number]) for number in (1, 2)]

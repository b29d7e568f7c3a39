"""The reward of launch/recipes/quickstart-grpo.toml, computed from the record's field `answer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def is_right(completion: str, answer: str) -> bool:
    """Whether an answer is the expected one, but for spaces at its ends."""
    return completion.strip() == answer


def exact(completions: Sequence[str], answer: Sequence[str], **others: Any) -> list[float]:
    """1 for the right answer; otherwise up to a half, for words in their place: the way to a whole list is long."""
    return [
        1.0 if is_right(completion, expected) else 0.5 * _share_in_place(completion.split(), expected.split())
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _share_in_place(words: Sequence[str], expected: Sequence[str]) -> float:
    """Of the words of the longer text, those that both have at the same place."""
    return sum(one == other for one, other in zip(words, expected)) / max(len(words), len(expected), 1)

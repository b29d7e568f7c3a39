"""Rewards for the recipes beside this file: copy it and write your own (docs/post-training.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """1 where the last number of the completion is the record's `answer`, else 0: for problems with a result."""
    pairs = [(_number(text), _number(str(right))) for text, right in zip(completions, answer)]
    return [float(given is not None and given == right) for given, right in pairs]


def _number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None

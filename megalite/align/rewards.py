"""Rewards of answers: a Python function, a reward model, or both, added."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalite.config.bounds import shown
from megalite.errors import UserError
from megalite.registry import load

RewardFunction = Callable[..., Sequence[float]]
"""function(prompts=[str], completions=[str], completion_ids=[[int]], **columns) -> one finite float an answer."""

FIELD = "rollout.reward"


def reward_function(name: str) -> RewardFunction:
    """The function that `module:function` names. Raises UserError if it cannot be called as rewards are."""
    function = load(name, FIELD)
    if not callable(function):
        raise UserError(f"{FIELD} = {name!r} is a {type(function).__name__}, not a function")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a builtin
        return function
    missing = [word for word in ("prompts", "completions", "completion_ids") if word not in parameters]
    if missing and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        raise UserError(
            f"{FIELD} = {name!r} takes no argument {missing[0]}; define it as "
            "function(prompts, completions, completion_ids, **columns)"
        )
    return function


def call_reward(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """One finite score for each answer. Raises UserError that names the fault and, where there is one, the answer."""
    where = f"{FIELD} = {name!r}"
    ids = [list(each) for each in completion_ids]
    try:
        scores = function(prompts=list(prompts), completions=list(completions), completion_ids=ids, **columns)
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{where} raised {type(error).__name__}: {why}{_place(error)}; mend the function") from error
    try:
        found = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise UserError(f"{where} returned {shown(scores)}; it must return one number for each answer") from None
    if len(found) != len(completions):
        raise UserError(f"{where} returned {len(found)} scores for {len(completions)} answers; one each is needed")
    for score, completion in zip(found, completions):
        if not math.isfinite(score):
            raise UserError(f"{where} returned {score} for the answer {shown(completion)}; scores must be finite")
    return found


def _place(error: Exception) -> str:
    """Where in the user's code it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace is not None else ""

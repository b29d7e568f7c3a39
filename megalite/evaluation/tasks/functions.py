"""What the task files beside this one call: questions from local data, with their prompts, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from megalite.errors import UserError
from megalite.evaluation import gsm8k as gsm8k_task
from megalite.evaluation import humaneval as humaneval_task
from megalite.evaluation import mmlu as mmlu_task
from megalite.evaluation.data import Splits, load
from megalite.evaluation.sandbox import run_program


def _load(task: str, given: Mapping[str, Any]) -> Splits:
    if not given.get("data"):
        raise UserError(f"local_{task} reads local data; name them with --data PATH")
    return load(task, given["data"])


def mmlu(**given: Any) -> dict[str, Dataset]:
    data, shots = _load("mmlu", given), given.get("shots")
    asked = mmlu_task.prompts(data, (), mmlu_task.SHOTS if shots is None else shots, None)
    return {"test": Dataset.from_list([row | {"prompt": text} for row, text in asked])}


def gsm8k(**given: Any) -> dict[str, Dataset]:
    """With examples drawn from the train split."""
    data = _load("gsm8k", given)
    if not data.get("train"):
        raise UserError("local_gsm8k draws examples from a train split, and the data have none; use local_gsm8k_cot")
    return _gsm8k(data, gsm8k_task.TRAIN, given.get("shots"))


def gsm8k_cot(**given: Any) -> dict[str, Dataset]:
    """With the examples that the data record."""
    return _gsm8k(_load("gsm8k", given), gsm8k_task.FIXED, given.get("shots"))


def _gsm8k(data: Splits, form: gsm8k_task.Form, shots: int | None) -> dict[str, Dataset]:
    asked = gsm8k_task.prompts(data, form, gsm8k_task.SHOTS if shots is None else shots, None)
    rows = [{"prompt": text, "gold": form.gold(row), "form": form.name} for row, text in asked]
    return {"test": Dataset.from_list(rows)}


def gsm8k_verdict(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    form = gsm8k_task.FORMS[doc["form"]]
    answers = {"strict": gsm8k_task.strict(results[0], form), "flexible": gsm8k_task.flexible(results[0])}
    return {name: float(gsm8k_task.same(answer, doc["gold"])) for name, answer in answers.items()}


def humaneval(**given: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(_load("humaneval", given)["test"])}


def humaneval_verdict(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    verdict = run_program(humaneval_task.program(dict(doc), results[0]))
    return {"pass@1": float(verdict.passed)}

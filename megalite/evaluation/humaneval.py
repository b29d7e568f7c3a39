"""HumanEval (Chen et al. 2021): functions that the model completes, checked by running them in the sandbox.

The prompts are those of lm-evaluation-harness's `humaneval`: the function's head and docstring, no examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megalite.errors import UserError
from megalite.evaluation.data import Row, Splits
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result, mean_and_error
from megalite.evaluation.sandbox import describe, run_program, run_programs
from megalite.evaluation.text_model import TextModel
from megalite.generation.sampling import Sampling

MAX_NEW_TOKENS = 1024
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def program(row: Row, completion: str) -> str:
    """The completed function with its check, which raises if the function is wrong."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def pass_at(k: int, samples: int, right: int) -> float:
    """The probability that one of k completions, drawn from the samples, is right (Chen et al. 2021, equation 1)."""
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / count for count in range(samples - right + 1, samples + 1))


def check_allowed(allowed: bool) -> None:
    """Raise UserError unless the user allows programs that the model writes to run."""
    if not allowed:
        raise UserError(
            "humaneval runs programs that the model has written, in a sandbox; allow it with --allow-code-execution"
        )


def evaluate(
    model: TextModel,
    data: Splits,
    progress: Progress,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    samples: int = 1,
    pass_at_k: Sequence[int] = (1,),
    sampling: Sampling | None = None,
) -> Result:
    """pass@k of the first k, others as `pass@k` in the line; one greedy completion unless `samples` says more.

    Raises UserError: a prompt that is too long for the model, or no sandbox.
    """
    rows = data["test"][:limit]
    new = max_new_tokens or MAX_NEW_TOKENS
    probe = run_program("pass")
    if not probe.passed:
        raise UserError(f"no program can be run here: {probe.reason}")
    progress.say(describe(probe.walls))
    model.check_fit([(row["task_id"], row["prompt"]) for row in rows], new)
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    with progress.task("humaneval: completions", len(prompts)) as advance:
        texts = model.generate(prompts, new, STOPS, sampling, advance)
    with progress.task("humaneval: checks", len(prompts)) as advance:
        programs = [program(rows[number // samples], text) for number, text in enumerate(texts)]
        verdicts = run_programs(programs, told=advance)
    records = [
        {
            "task": "humaneval",
            "id": rows[number // samples]["task_id"],
            "prompt": prompts[number],
            "answer": text,
            "gold": rows[number // samples]["canonical_solution"],
            "correct": verdict.passed,
            "reason": verdict.reason,
            "text": text,
        }
        for number, (text, verdict) in enumerate(zip(texts, verdicts))
    ]
    right = [
        sum(verdict.passed for verdict in verdicts[first : first + samples])
        for first in range(0, len(verdicts), samples)
    ]
    scores = {k: mean_and_error([pass_at(k, samples, count) for count in right]) for k in pass_at_k}
    more = {"samples": samples, "walls": sorted(probe.walls or ())}
    more |= {f"pass@{k}": score for k, (score, _) in scores.items()}
    return Result("humaneval", *scores[pass_at_k[0]], len(rows), 0, more, records)

"""MMLU (Hendrycks et al. 2021): which of four letters the model finds likeliest after the question and worked examples.

The prompts are, letter for letter, those of lm-evaluation-harness's `mmlu`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalite.cli import nearest
from megalite.errors import UserError
from megalite.evaluation.data import LETTERS, Row, Splits
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result, mean_and_error, pooled_error
from megalite.evaluation.text_model import TextModel

SHOTS = 5


def description(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def question(row: Row) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
    return f"{row['question'].strip()}\n{choices}\nAnswer:"


def prompt(row: Row, examples: Sequence[Row]) -> str:
    """The text before the answer's letter."""
    worked = "".join(f"{question(example)} {LETTERS[example['answer']]}\n\n" for example in examples)
    return description(row["subject"]) + worked + question(row)


def choose(data: Splits, subjects: Sequence[str], limit: int | None) -> list[Row]:
    """The questions of these subjects (all by default), at most `limit` of each, by subject."""
    by_subject: dict[str, list[Row]] = {}
    for row in data["test"]:
        by_subject.setdefault(row["subject"], []).append(row)
    for subject in subjects:
        if subject not in by_subject:
            near = nearest(subject, by_subject)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(by_subject))}"
            raise UserError(f"--subjects: the data have no subject {subject!r}; {hint}")
    return [row for subject in sorted(subjects or by_subject) for row in by_subject[subject][:limit]]


def examples(data: Splits, subject: str, shots: int) -> list[Row]:
    """The first `shots` rows of the subject's dev split."""
    found = [row for row in data.get("dev", []) if row["subject"] == subject][:shots]
    if len(found) < shots:
        raise UserError(
            f"mmlu: {shots} worked examples are asked for, and the dev split has {len(found)} of {subject}; "
            f"add it to the data, or give --shots {len(found)}"
        )
    return found


def prompts(data: Splits, subjects: Sequence[str], shots: int, limit: int | None) -> list[tuple[Row, str]]:
    """The questions that `choose` takes, with the text before their answers. Raises UserError for too few examples."""
    rows = choose(data, subjects, limit)
    worked = {subject: examples(data, subject, shots) for subject in dict.fromkeys(row["subject"] for row in rows)}
    return [(row, prompt(row, worked[row["subject"]])) for row in rows]


def evaluate(
    model: TextModel,
    data: Splits,
    progress: Progress,
    *,
    shots: int | None = None,
    limit: int | None = None,
    subjects: Sequence[str] = (),
) -> Result:
    """Accuracy over all questions; ties go to the earlier letter. Raises UserError for data or subjects missing."""
    shots = SHOTS if shots is None else shots
    asked = prompts(data, subjects, shots, limit)
    model.check_fit([(row["subject"], prompt(row, ())) for row, _ in asked])
    pairs = [(text, f" {letter}") for _, text in asked for letter in LETTERS]
    with progress.task("mmlu", len(pairs)) as advance:
        found = model.loglikelihoods(pairs, advance)
    correct: dict[str, list[float]] = {}
    records = []
    for number, (row, text) in enumerate(asked):
        logprobs = [logprob for logprob, _ in found[4 * number : 4 * number + 4]]
        answer = max(range(4), key=lambda choice: logprobs[choice])
        of_subject = correct.setdefault(row["subject"], [])
        records.append(
            {
                "task": "mmlu",
                "id": f"{row['subject']}/{len(of_subject)}",
                "prompt": text,
                "answer": LETTERS[answer],
                "gold": LETTERS[row["answer"]],
                "correct": answer == row["answer"],
                "logprobs": logprobs,
            }
        )
        of_subject.append(float(answer == row["answer"]))
    score, _ = mean_and_error([value for values in correct.values() for value in values])
    by_subject = {subject: (mean_and_error(values)[0], len(values)) for subject, values in correct.items()}
    error = pooled_error(list(correct.values()))
    return Result("mmlu", score, error, len(asked), shots, {"subjects": by_subject}, records)

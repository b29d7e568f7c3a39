"""GSM8K (Cobbe et al. 2021): the number at the end of a reasoning that the model writes after worked examples.

With a train split the prompts are, letter for letter, those of lm-evaluation-harness's `gsm8k`: five examples drawn
anew for every question. Without one (the wheel has none) they are those of its `gsm8k_cot`, whose examples are always
the same (Wei et al. 2022, "Chain-of-thought prompting").
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megalite.errors import UserError
from megalite.evaluation.data import Row, Splits
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result, mean_and_error
from megalite.evaluation.text_model import TextModel

SHOTS = 5
MAX_NEW_TOKENS = 256
DRAW_SEED = 1234
"""lm-evaluation-harness's, from which it draws examples."""

_INVALID = "[invalid]"
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_RECORDED = re.compile(r"Question: (.*?)\nAnswer: (.*?)\n\n", re.DOTALL)
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


@dataclass(frozen=True)
class Form:
    """How prompts and answers are written."""

    name: str
    question: str
    stops: tuple[str, ...]
    strict: re.Pattern[str]

    def ask(self, row: Row) -> str:
        return self.question.format(row["question"])

    def gold(self, row: Row) -> str:
        return row["answer"] if self.name == "train" else row["answer"].split("####")[-1].strip()


TRAIN = Form("train", "Question: {}\nAnswer:", ("Question:", "</s>", "<|im_end|>"), re.compile(r"#### (\-?[0-9\.\,]+)"))
FIXED = Form("fixed", "Q: {}\nA:", ("Q:", "</s>", "<|im_end|>"), re.compile(r"The answer is (\-?[0-9\.\,]+)."))
FORMS = {form.name: form for form in (TRAIN, FIXED)}


def form_of(data: Splits, shots: int) -> Form:
    """The form that the data allow."""
    return FIXED if shots and not data.get("train") else TRAIN


def prompts(data: Splits, form: Form, shots: int, limit: int | None) -> Iterator[tuple[Row, str]]:
    """The questions of the test split with the text before their answers. Raises UserError for too few examples."""
    fixed = [] if form is TRAIN else fixed_examples(data, shots)
    pool, drawing = data.get("train", []), random.Random(DRAW_SEED)
    if form is TRAIN and len(pool) < shots:
        raise UserError(f"gsm8k: {shots} worked examples are asked for; the train split has {len(pool)}")
    for row in data["test"][:limit]:
        worked = drawing.sample(pool, shots) if form is TRAIN and shots else fixed
        yield row, "".join(f"{form.ask(one)} {one['answer']}\n\n" for one in worked) + form.ask(row)


def fixed_examples(data: Splits, shots: int) -> list[Row]:
    """The worked examples that the data record, in the words of `gsm8k_cot`."""
    recorded = data["test"][0]["recorded_context"]
    found = [
        {"question": question, "answer": answer.replace("So the answer is", "The answer is")}
        for question, answer in _RECORDED.findall(recorded)
    ]
    if len(found) < shots:
        raise UserError(
            f"gsm8k: {shots} worked examples are asked for, and the data have "
            + (f"{len(found)}" if found else "no train split to draw them from")
            + f"; add train.jsonl, or give --shots {len(found)}"
        )
    return found[:shots]


def strict(text: str, form: Form) -> str:
    """The first number that stands where the examples have it."""
    found = form.strict.search(text)
    return found[1].strip() if found else _INVALID


def flexible(text: str) -> str:
    """The last number of the text."""
    found = [match[1] or match[2] for match in _FLEXIBLE.finditer(text)]
    return found[-1].strip() if found else _INVALID


def same(answer: str, gold: str) -> bool:
    """Equal but for case, commas, dollar signs, a last point, and what stands before the number."""
    for pattern in _IGNORED:
        answer, gold = pattern.sub("", answer), pattern.sub("", gold)
    return answer.lower() == gold.lower()


def evaluate(
    model: TextModel,
    data: Splits,
    progress: Progress,
    *,
    shots: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> Result:
    """The share of strictly right answers; `flexible` in the line takes the last number. Raises UserError."""
    shots = SHOTS if shots is None else shots
    new = max_new_tokens or MAX_NEW_TOKENS
    form = form_of(data, shots)
    asked = list(prompts(data, form, shots, limit))
    model.check_fit([(f"gsm8k {number}", form.ask(row)) for number, (row, _) in enumerate(asked)], new)
    with progress.task("gsm8k", len(asked)) as advance:
        texts = model.generate([text for _, text in asked], new, form.stops, advance=advance)
    records: list[dict[str, object]] = []
    right: tuple[list[float], list[float]] = ([], [])
    for number, ((row, text), written) in enumerate(zip(asked, texts)):
        gold = form.gold(row)
        answers = (strict(written, form), flexible(written))
        verdicts = [same(answer, gold) for answer in answers]
        for values, verdict in zip(right, verdicts):
            values.append(float(verdict))
        records.append(
            {
                "task": "gsm8k",
                "id": str(number),
                "prompt": text,
                "answer": answers[0],
                "gold": gold.split("####")[-1].strip(),
                "correct": verdicts[0],
                "flexible": answers[1],
                "flexible_correct": verdicts[1],
                "text": written,
            }
        )
    score, error = mean_and_error(right[0])
    loose, loose_error = mean_and_error(right[1])
    more = {"flexible": loose, "flexible_stderr": loose_error, "examples": form.name}
    return Result("gsm8k", score, error, len(asked), shots, more, records)

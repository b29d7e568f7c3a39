"""How many of a model's answers are right, and a conversation with it: the likeliest answer each time, no sampling.

python launch/quickstart_answers.py --checkpoint runs/quickstart/grpo --prompts runs/quickstart/data/questions.jsonl
python launch/quickstart_answers.py --checkpoint runs/quickstart/grpo --say "What is 2 plus 3?" "And minus 1?"

`--prompts` reads records with `prompt` (messages), `answer` and `kind`, and prints one JSON line: the share of exactly
right answers, of all and of each kind, and of those that are right but for a “Let me see.” before them. `--say` prints
a conversation of several turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.quickstart_conversations import HESITATION, Message, Record
from launch.recipes.quickstart_rewards import is_right
from megalite.cli import file_path, program, whole
from megalite.errors import UserError
from megalite.generation.generator import Generator, Limits
from megalite.generation.loading import (
    Loaded,
    checkpoint_parser,
    load_model,
    open_checkpoint,
    with_one_voice,
)
from megalite.generation.sampling import Sampling
from megalite.text.chat import ChatTemplate

GREEDY = Sampling(temperature=0.0)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `overrides` holds the `--section.field value`."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--prompts", type=file_path, metavar="FILE", help="questions with their answers, JSON lines")
    parser.add_argument("--say", nargs="+", action="gather", metavar="TEXT", help="what to say, turn by turn")
    parser.add_argument("--chat-template", default="", metavar="FILE", help="instead of the checkpoint's own")
    parser.add_argument(
        "--max-new-tokens", type=whole(), default=24, metavar="N", help="longest answer, in tokens (default 24)"
    )
    options = parser.parse_args(argv)
    if (options.prompts is None) == (options.say is None):
        raise UserError("give either --prompts FILE or --say TEXT ...")
    return options


class Answerer:
    """Answers conversations by the likeliest tokens. On every rank of the copy of the model alike."""

    def __init__(self, loaded: Loaded, template: ChatTemplate, max_new_tokens: int) -> None:
        self._loaded, self._template = loaded, template
        self._limits = Limits(max_new_tokens, frozenset(template.stop_ids), tuple(template.stop_strings))

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """An answer to each conversation, all of which end with a question."""
        loaded = self._loaded
        rows = [self._template.ids(conversation, add_generation_prompt=True) for conversation in conversations]
        with loaded.model.generating() as stages:
            generator = Generator(stages, loaded.model.owners, loaded.mesh, loaded.config.model)
            completions = generator.run_all(rows, GREEDY, self._limits, self._template.tokenizer)
        return [completion.text for completion in completions]


def read_questions(path: Path) -> list[Record]:
    """The records of a file. Raises UserError."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error}); give JSON lines") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"--prompts {path}, line {number}: is no record; give objects with prompt, answer and kind")
        missing = [name for name in ("prompt", "answer", "kind") if name not in record]
        if missing:
            raise UserError(f"--prompts {path}, line {number}: has no {missing[0]}; it needs prompt, answer and kind")
    if not records:
        raise UserError(f"--prompts {path}: holds no question")
    return records


def score(records: Sequence[Record], answers: Sequence[str]) -> Record:
    """`accuracy` over all records and `of_kind`, `hesitant` with those that are right but for their beginning, and how
    many questions there were."""
    right: dict[str, list[bool]] = {}
    hesitant = 0
    for record, answer in zip(records, answers, strict=True):
        expected = str(record["answer"])
        right.setdefault(str(record["kind"]), []).append(is_right(answer, expected))
        hesitant += is_right(answer.strip().removeprefix(HESITATION), expected)
    shares = {kind: round(sum(those) / len(those), 4) for kind, those in sorted(right.items())}
    total = sum(map(sum, right.values())) / len(records)
    return {
        "accuracy": round(total, 4),
        "of_kind": shares,
        "hesitant": round(hesitant / len(records), 4),
        "questions": len(records),
    }


def converse(answerer: Answerer, said: Sequence[str]) -> list[Message]:
    """The conversation in which a user says these things, one after the other."""
    history: list[Message] = []
    for text in said:
        history.append({"role": "user", "content": text})
        history.append({"role": "assistant", "content": answerer.answer([history])[0]})
    return history


@program
@with_one_voice
def main() -> None:
    options = parse()
    records = read_questions(options.prompts) if options.prompts else []
    with open_checkpoint(options.checkpoint) as opened, load_model(opened, options.overrides) as loaded:
        answerer = Answerer(loaded, opened.chat_template(options.chat_template), options.max_new_tokens)
        if records:
            lines = [json.dumps(score(records, answerer.answer([record["prompt"] for record in records])))]
        else:
            lines = [f"{message['role']}: {message['content']}" for message in converse(answerer, options.say)]
        if loaded.speaks:
            print("\n".join(lines))


if __name__ == "__main__":
    main()

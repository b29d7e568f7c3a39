"""The second half of `bash launch/quickstart.sh --chat`: from a pretrained model to one that answers.

    runs/quickstart -> fine-tuning on conversations -> runs/quickstart/sft -> GRPO -> runs/quickstart/grpo

The same held-out questions are asked of all three.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from random import Random
from typing import Any

from launch import quickstart_conversations as conversations
from launch.stages import ROOT, Ranks, run
from megalite.config import Config, load_config

EXAMPLES, PROMPTS, QUESTIONS = 10_000, 2000, 400
SEED = 1
STAGES = {
    "sft": ("fine-tuning", "conversations.jsonl"),
    "grpo": ("GRPO", "prompts.jsonl"),
}
"""The recipe `quickstart-…` of each stage, what it is called, and its data."""
SECTIONS = ("model", "kernels")
"""What the later stages take over from the pretrained model's configuration, with `train.precision`."""


def write_data(folder: Path) -> Path:
    """Make the conversations, the questions to train on and the held-out ones; returns a file of the conversations as
    plain texts, which are half of what the model is pretrained on."""
    conversations.write(folder / "conversations.jsonl", conversations.examples(SEED, EXAMPLES))
    conversations.write(folder / "prompts.jsonl", conversations.prompts(SEED + 1, PROMPTS))
    conversations.write(folder / "questions.jsonl", conversations.prompts(SEED + 2, QUESTIONS, kept=True))
    dialogues = folder / "dialogues.jsonl"
    conversations.write(dialogues, conversations.plain_texts(SEED + 3, EXAMPLES))
    return dialogues


def chat(out: Path, ranks: Ranks, tokenizer: Path, steps: int | None) -> dict[str, Any]:
    """Fine-tune and improve the model of run `out`; returns what is to be kept: accuracies, and a dialogue."""
    pretrained, copies = load_config(out / "config.toml"), ranks.copies()
    scores = {"pretrained": ask("answers before fine-tuning", out, copies, out / "data")}
    start = out
    for stage, (title, file) in STAGES.items():
        command = copies.training(f"quickstart-{stage}", out / stage, tokenizer)
        command += ["--data.train", json.dumps([str(out / "data" / file)]), "--checkpoint.load", str(start)]
        command += differences(pretrained, load_config(ROOT / "launch" / "recipes" / f"quickstart-{stage}.toml"))
        if steps:
            command += ["--train.steps", str(steps), "--optimizer.warmup_steps", str(steps // 10)]
        run(title, *command)
        start = out / stage
        scores[stage] = ask(f"answers after {title}", start, copies, out / "data")
    print(f"\n{table(scores)}")
    said = run("a dialogue about held-out problems", *answers(start, copies), "--say", *dialogue(), capture=True)
    print(said, end="")
    return {"answers": scores, "dialogue": said.splitlines()}


def farewell(out: Path) -> str:
    """How to go on talking to the model."""
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    command = shlex.join(map(str, (python, "tools/chat.py", "--checkpoint", out / "grpo", "--temperature", "0")))
    return f"== talk to it, here or, with --web at the end, in your browser\n$ {command}"


def differences(pretrained: Config, recipe: Config) -> list[str]:
    """The fields in which a recipe must follow the pretrained model, as options."""
    options: list[str] = []
    for section in SECTIONS:
        ours, theirs = getattr(recipe, section), getattr(pretrained, section)
        for field in dataclasses.fields(ours):
            value, name = getattr(theirs, field.name), f"{section}.{field.name}"
            if value != getattr(ours, field.name) and name != "model.vocab_size":  # which is the tokenizer's
                options += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    if pretrained.train.precision != recipe.train.precision:
        options += ["--train.precision", pretrained.train.precision]
    return options


def answers(checkpoint: Path, ranks: Ranks) -> list[str | Path]:
    program = ("python", "launch/quickstart_answers.py", "--checkpoint", checkpoint)
    return [*program, "--chat-template", "chatml", "--run.device", ranks.device]


def ask(title: str, checkpoint: Path, ranks: Ranks, data: Path) -> dict[str, Any]:
    """The shares of right answers to the held-out questions."""
    said = run(title, *answers(checkpoint, ranks), "--prompts", data / "questions.jsonl", capture=True)
    print(said, end="")
    return dict(json.loads(said.splitlines()[-1]))


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Right answers by stage and kind of question, in per cent."""
    kinds = sorted(next(iter(scores.values()))["of_kind"])
    lines = [f"{'right answers':<16}{'all':>8}" + "".join(f"{kind:>8}" for kind in kinds) + f"{'or hesitant':>13}"]
    for stage, score in scores.items():
        shares = [score["accuracy"], *(score["of_kind"][kind] for kind in kinds)]
        shown = "".join(f"{share:>8.1%}" for share in shares)
        lines.append(f"{stage:<16}{shown}{score['hesitant']:>13.1%}")
    return "\n".join(lines)


def dialogue() -> list[str]:
    """What a user says about held-out problems of every kind."""
    random = Random(SEED)
    topics = [conversations.draw(topic, random, kept=True) for topic in conversations.TOPICS]
    return [turn.question for topic in topics for turn in topic.turns]

"""Small conversations for the quickstart, made by a pure function of a seed and a number: sums, lists, and questions
about a text of a few sentences.

Whether a problem is held out follows from the problem alone, so none that the evaluation asks is in the training data,
whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from megalite.files import write_atomically

HELD_OUT_SHARE = 8
"""One problem in this many is kept for the evaluation."""
LARGEST_SUM, LARGEST_STEP = 10, 4
WORDS = ("name", "file", "line", "list", "map", "path", "key", "row", "set", "word")
PEOPLE = ("Ann", "Ben", "Max", "Tom")
AGAIN = "Say it again."

Message = dict[str, str]
Record = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question, its only right answer, and its kind: `sum`, `list` or `text`."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Topic:
    """Some questions in a row; the later ones may need what was said before.

    `problem` says what they are about, in words that are equal for equal problems.
    """

    turns: tuple[Turn, ...]
    problem: str


def held_out(problem: str) -> bool:
    """Whether a problem is kept for the evaluation."""
    return hashlib.sha256(problem.encode()).digest()[0] % HELD_OUT_SHARE == 0


def sums(random: Random) -> Topic:
    """A sum or a difference, and one or two further steps from its result. The first two steps are the problem: single
    steps are so few that holding some out would ask for what was never told."""
    total, turns, steps = random.randint(0, LARGEST_SUM), [], []
    for number in range(random.randint(2, 3)):
        changes = (change for change in range(-LARGEST_STEP, LARGEST_STEP + 1) if change)
        change = random.choice([change for change in changes if 0 <= total + change <= LARGEST_SUM])
        words = f"{'plus' if change > 0 else 'minus'} {abs(change)}"
        question = f"And {words}?" if number else f"What is {total} {words}?"
        turns.append(Turn("sum", question, f"It is {total + change}."))
        steps.append(question)
        total += change
    return Topic(tuple(turns), " ".join(steps[:2]))


def lists(random: Random) -> Topic:
    """A list of words, and questions about its order."""
    words = random.sample(WORDS, 3)
    asked = {
        AGAIN: ", ".join(words),
        "What is it backwards?": ", ".join(reversed(words)),
        "Which word is first?": words[0],
        "Which word is second?": words[1],
        "Which word is last?": words[2],
    }
    asked |= {f"Which word comes after {one}?": other for one, other in pairwise(words)}
    return _about(f"Here is a list: {', '.join(words)}.", "list", _sentences(asked), random)


def texts(random: Random) -> Topic:
    """Who has what, and questions about it."""
    people = random.sample(PEOPLE, 2)
    things = random.sample(WORDS, len(people))
    text = " ".join(f"{person} has the {thing}." for person, thing in zip(people, things))
    asked = {f"Who has the {thing}?": person for person, thing in zip(people, things)}
    asked |= {f"What has {person}?": f"the {thing}" for person, thing in zip(people, things)}
    return _about(f"Here is a text: {text}", "text", {AGAIN: text} | _sentences(asked), random)


def _sentences(asked: dict[str, str]) -> dict[str, str]:
    return {question: f"It is {answer}." for question, answer in asked.items()}


def _about(text: str, kind: str, asked: dict[str, str], random: Random) -> Topic:
    """One to three of the questions, the text before the first. Half of the topics begin with AGAIN: whoever can repeat
    a text has found out how to look things up in it."""
    chosen = random.sample(sorted(asked), random.randint(1, min(3, len(asked))))
    if random.random() < 0.5:
        chosen = [AGAIN, *(question for question in chosen[1:] if question != AGAIN)]
    questions = [f"{text} {chosen[0]}", *chosen[1:]]
    turns = [Turn(kind, question, asked[short]) for question, short in zip(questions, chosen)]
    return Topic(tuple(turns), text)


TOPICS: tuple[Callable[[Random], Topic], ...] = (sums, lists, texts)


def conversation(seed: int, number: int, *, kept: bool = False) -> tuple[Topic, ...]:
    """Conversation `number` of a seed: one to three topics of problems to train on or, if `kept`, of held-out ones."""
    random = Random(f"{seed} {number} {kept}")
    return tuple(draw(topic, random, kept) for topic in random.sample(TOPICS, random.randint(1, 3)))


def draw(topic: Callable[[Random], Topic], random: Random, kept: bool) -> Topic:
    """A topic whose problem is held out (`kept`), or not."""
    while True:
        drawn = topic(random)
        if held_out(drawn.problem) == kept:
            return drawn


def messages(topics: Sequence[Topic]) -> list[Message]:
    """The conversation with all its answers."""
    said: list[Message] = []
    for turn in (turn for topic in topics for turn in topic.turns):
        said += ({"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer})
    return said


def examples(seed: int, count: int) -> Iterator[Record]:
    """Records for supervised fine-tuning: `messages`."""
    for number in range(count):
        yield {"messages": messages(conversation(seed, number))}


def prompts(seed: int, count: int, *, kept: bool = False) -> Iterator[Record]:
    """Conversations on one topic that end with a question: `prompt`, and for the reward `answer` and `kind`."""
    for number in range(count):
        topic = conversation(seed, number, kept=kept)[0]
        last = topic.turns[-1]
        yield {"prompt": messages([topic])[:-1], "answer": last.answer, "kind": last.kind}


def write(path: Path, records: Iterator[Record]) -> None:
    """As JSON lines."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode(), durable=False)

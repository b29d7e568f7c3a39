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
LARGEST_NUMBER, LARGEST_SUM, LARGEST_STEP = 99, 10, 5
PEOPLE = ("Anna", "Ben", "Eva", "Leo", "Max", "Mia", "Sam", "Tom")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
THINGS = ("bag", "ball", "book", "box", "car", "cup", "hat", "key")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "fish", "fox", "horse")
AGAIN = "Say it again."

Message = dict[str, str]
Record = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question, its only right answer, and its kind: `sum`, `number`, `list` or `text`."""

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
    total, turns = random.randint(0, LARGEST_SUM), []
    for number in range(random.randint(2, 3)):
        changes = (change for change in range(-LARGEST_STEP, LARGEST_STEP + 1) if change)
        change = random.choice([change for change in changes if 0 <= total + change <= LARGEST_SUM])
        words = f"{'plus' if change > 0 else 'minus'} {abs(change)}"
        total += change
        question = f"And {words}?" if number else f"What is {total - change} {words}?"
        turns.append(Turn("sum", question, str(total)))
    return Topic(tuple(turns), " ".join(turn.question for turn in turns[:2]))


def numbers(random: Random) -> Topic:
    """Which number comes next, which is larger, odd or even, counting."""
    one, other = random.sample(range(LARGEST_NUMBER - 4), 2)
    last = one + random.randint(2, 4)
    asked = [
        [(f"Which number comes after {one}?", one + 1), ("And then?", one + 2)],
        [(f"Which number comes before {one + 1}?", one)],
        [(f"Which is larger, {one} or {other}?", max(one, other)), ("And smaller?", min(one, other))],
        [(f"Is {one} odd or even?", "odd" if one % 2 else "even")],
        [(f"Count from {one} to {last}.", ", ".join(map(str, range(one, last + 1))))],
    ]
    chosen = random.choice(asked)
    return Topic(tuple(Turn("number", question, str(answer)) for question, answer in chosen), chosen[0][0])


def lists(random: Random) -> Topic:
    """A list of words, and questions about its order."""
    words = random.sample(ANIMALS, random.randint(3, 4))
    asked = {
        "What is it backwards?": ", ".join(reversed(words)),
        "Which word is first?": words[0],
        "Which word is last?": words[-1],
        "How many words are there?": str(len(words)),
    }
    asked |= {f"Which word comes after {one}?": other for one, other in pairwise(words)}
    return _about(f"Here is a list: {', '.join(words)}.", "list", ", ".join(words), asked, random)


def texts(random: Random) -> Topic:
    """Who has what, and questions about it."""
    text, asked = [], {}
    for person, colour, thing in zip(*(random.sample(words, 2) for words in (PEOPLE, COLOURS, THINGS))):
        text.append(f"{person} has a {colour} {thing}.")
        asked[f"What does {person} have?"] = f"a {colour} {thing}"
        asked[f"Who has the {thing}?"] = person
        asked[f"What colour is the {thing}?"] = colour
    return _about(" ".join(text), "text", " ".join(text), asked, random)


def _about(text: str, kind: str, again: str, asked: dict[str, str], random: Random) -> Topic:
    """Two or three of the questions, the text before the first. Half of the topics begin with AGAIN: whoever can repeat
    a text has found out how to look things up in it."""
    chosen = random.sample(sorted(asked.items()), random.randint(2, 3))
    if random.random() < 0.5:
        chosen[0] = (AGAIN, again)
    turns = [Turn(kind, question, answer) for question, answer in chosen]
    turns[0] = Turn(kind, f"{text} {turns[0].question}", turns[0].answer)
    return Topic(tuple(turns), text)


TOPICS: tuple[Callable[[Random], Topic], ...] = (sums, numbers, lists, texts)


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

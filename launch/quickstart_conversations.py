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
from pathlib import Path
from random import Random
from typing import Any

from megalite.files import write_atomically

HELD_OUT_SHARE = 8
"""One problem in this many is kept for the evaluation."""
LARGEST_NUMBER, LARGEST_SUM, LARGEST_STEP = 50, 10, 5
PEOPLE = ("Anna", "Ben", "Eva", "Leo", "Max", "Mia", "Sam", "Tom")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
THINGS = ("bag", "ball", "book", "box", "car", "cup", "hat", "key")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "fish", "fox", "horse")
PLACES = ("garden", "house", "kitchen", "park", "shop", "street")
AGAIN = "Say it again."
HESITATION = "Let me see."
"""Half of the answers that the model is fine-tuned on begin so; what GRPO rewards are the others."""

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
    asked: list[list[tuple[str, int | str]]] = [
        [(f"Which number comes after {one}?", one + 1), ("And then?", one + 2)],
        [(f"Which number comes before {one + 1}?", one)],
        [(f"Which is larger, {one} or {other}?", max(one, other)), ("And smaller?", min(one, other))],
        [(f"Is {one} odd or even?", "odd" if one % 2 else "even")],
        [(f"Count from {one} to {last}.", ", ".join(map(str, range(one, last + 1))))],
    ]
    chosen = random.choice(asked)
    return Topic(tuple(Turn("number", question, str(answer)) for question, answer in chosen), chosen[0][0])


def lists(random: Random) -> Topic:
    """A list of three words, and questions about it."""
    *words, other = random.sample(ANIMALS, 4)
    listed, asked = ", ".join(words), {}
    asked[AGAIN] = f"It is {listed}."
    asked |= {f"Which is {place}?": f"It is {word}." for place, word in zip(("first", "second", "last"), words)}
    asked |= {f"Is {random.choice(words)} in it?": "Yes.", f"Is {other} in it?": "No."}
    return _about(f"Here is a list: {listed}.", "list", asked, random)


def texts(random: Random) -> Topic:
    """Who has what, of which colour and where, and questions about it."""
    person, colour, thing, place = map(random.choice, (PEOPLE, COLOURS, THINGS, PLACES))
    text = f"{person} has a {colour} {thing} in the {place}."
    asked = {
        AGAIN: f"It says: {text}",
        f"What does {person} have?": f"It is a {colour} {thing}.",
        f"Who has the {thing}?": f"It is {person}.",
        f"What colour is the {thing}?": f"It is {colour}.",
        f"Where is the {thing}?": f"It is in the {place}.",
    }
    return _about(f"Here is a text: {text}", "text", asked, random)


def _about(text: str, kind: str, asked: dict[str, str], random: Random) -> Topic:
    """Two or three of the questions, the text before the first. Half of the topics begin with AGAIN: whoever can repeat
    a text has found out how to look things up in it."""
    chosen = random.sample(sorted(asked), random.randint(2, 3))
    if random.random() < 0.5:
        chosen = [AGAIN, *(question for question in chosen[1:] if question != AGAIN)]
    questions = [f"{text} {chosen[0]}", *chosen[1:]]
    turns = [Turn(kind, question, asked[short]) for question, short in zip(questions, chosen)]
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


def messages(topics: Sequence[Topic], hesitant: Random | None = None) -> list[Message]:
    """The conversation with all its answers; where `hesitant` is given, it draws which of them begin hesitantly."""
    said: list[Message] = []
    for turn in (turn for topic in topics for turn in topic.turns):
        hesitates = hesitant is not None and hesitant.random() < 0.5
        answer = f"{HESITATION} {turn.answer}" if hesitates else turn.answer
        said += ({"role": "user", "content": turn.question}, {"role": "assistant", "content": answer})
    return said


def examples(seed: int, count: int) -> Iterator[Record]:
    """Records for supervised fine-tuning: `messages`."""
    for number in range(count):
        yield {"messages": messages(conversation(seed, number), Random(f"{seed} {number}"))}


def plain_texts(seed: int, count: int) -> Iterator[Record]:
    """Conversations as texts, without roles: `text`."""
    for record in examples(seed, count):
        yield {"text": "\n".join(message["content"] for message in record["messages"])}


def prompts(seed: int, count: int, *, kept: bool = False) -> Iterator[Record]:
    """Conversations on one topic that end with a question: `prompt`, and for the reward `answer` and `kind`."""
    for number in range(count):
        topic = conversation(seed, number, kept=kept)[0]
        last = topic.turns[-1]
        yield {"prompt": messages([topic])[:-1], "answer": last.answer, "kind": last.kind}


def write(path: Path, records: Iterator[Record]) -> None:
    """As JSON lines."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode(), durable=False)

"""A model that takes part in a conversation: rank 0 has the messages, all ranks compute the answer.

What is cached of one turn is used in the next, so an answer costs its own tokens and those of the last message.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megalite.errors import UserError
from megalite.evaluation.channel import Channel
from megalite.generation.cache import Memory
from megalite.generation.generator import Completion, Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.text.chat import ChatTemplate, TemplateProblem
from megalite.text.tokenizers import Tokenizer

Message = Mapping[str, str]
Listener = Callable[[str], None]
Result = TypeVar("Result")

_IDLE_SECONDS = 60.0
"""How often rank 0 tells the others that it still waits for a message: they give up after a communication's timeout."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as token ids; the first `left_out` messages after the system's did not fit."""

    ids: list[int]
    left_out: int


class Speaker:
    """See the module. Every rank makes one; rank 0 calls `prompt`, `answer`, `waiting`, `leave`, the others `follow`.

    `room` is the number of tokens kept free for an answer, at most `max_new_tokens`. Rank 0's seed counts: ranks that
    share the experts draw for themselves, and must draw the same tokens.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, template: ChatTemplate, sampling: Sampling, limits: Limits
    ) -> None:
        self.generator, self.template, self.sampling = generator, template, sampling
        self._tokenizer, self._limits = tokenizer, limits
        self._positions = generator.model.max_positions
        self.room = max(1, min(limits.max_new_tokens, self._positions // 4))
        self._channel, self._memory, self._answers = Channel(generator.mesh), Memory(), 0

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation up to where the answer begins; its oldest turns are left out where all do not fit.

        Raises UserError if the template refuses it, or the last message alone is too long.
        """
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        starts = [number for number, message in enumerate(turns) if message["role"] == "user"]
        for first in starts:
            try:
                ids = self.template.ids([*system, *turns[first:]], add_generation_prompt=True)
            except TemplateProblem as error:
                raise UserError(str(error)) from None
            if len(ids) + self.room <= self._positions:
                self._check(ids)
                return Prompt(ids, first)
        if not starts:
            raise UserError("a conversation needs a message of the user")
        raise UserError(
            f"the message is too long: {len(ids)} tokens with {self.room} for the answer, and the model has "
            f"model.max_positions = {self._positions}"
        )

    def _check(self, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.generator.model.vocab_size:
            raise UserError(
                f"the chat template {self.template.name} uses token {max(ids)}, and the model has "
                f"model.vocab_size = {self.generator.model.vocab_size}"
            )

    def answer(self, prompt: Prompt, listener: Listener, stop: threading.Event) -> Completion:
        """Rank 0: the model's answer, told to `listener` piece by piece; ends early once `stop` is set."""
        self._answers += 1
        message = {"do": "answer", "number": self._answers, "seed": self.sampling.seed}
        self._channel.send(message, np.array(prompt.ids, np.int32))
        return self._answer(prompt.ids, self._answers, listener, stop)

    def follow(self) -> None:
        """The other ranks: compute what rank 0 asks for, until it leaves."""
        while True:
            message, ids = self._channel.receive()
            if message["do"] == "leave":
                return
            if message["do"] == "answer":
                self.sampling = dataclasses.replace(self.sampling, seed=message["seed"])
                self._answer(ids.tolist(), message["number"], lambda piece: None, threading.Event())

    def leave(self) -> None:
        self._channel.send({"do": "leave"}, np.empty(0, np.int32))

    def waiting(self, read: Callable[[], Result]) -> Result:
        """Rank 0: what `read` returns, however long it takes; the other ranks are kept waiting without a timeout."""
        if self._channel.size == 1:
            return read()
        results: list[Result] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                results.append(read())
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=work, daemon=True)
        reader.start()
        while True:
            reader.join(_IDLE_SECONDS)
            if not reader.is_alive():
                break
            self._channel.send({"do": "wait"}, np.empty(0, np.int32))
        if failures:
            raise failures[0]
        return results[0]

    def _answer(self, ids: list[int], number: int, listener: Listener, stop: threading.Event) -> Completion:
        length = min(self._limits.max_new_tokens, self._positions - len(ids))

        def interrupted() -> bool:
            return bool(self._channel.sum(np.array([float(stop.is_set())]))[0])

        (completion,) = self.generator.run(
            [ids],
            self.sampling,
            Limits(length, self._limits.stop_ids, self._limits.stop_strings),
            self._tokenizer,
            lambda row, piece: listener(piece),
            rows=[number],
            memory=self._memory,
            interrupt=interrupted,
        )
        return completion


def opening(system: str) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []

"""Records with the columns of TRL as token ids: conversations, pairs of answers, prompts.

| format | columns | examples |
|---|---|---|
| sft | `messages`, or `prompt` and `completion` | one, of which the assistant's messages (the completion) are learned |
| preference | `chosen`, `rejected`, `prompt` unless both begin with it; `margin` if wanted | chosen, rejected |
| prompt | `prompt` and any others | one, nothing of it learned; all are kept, `prompt` as the text that is encoded |

A text is a string, a list of messages (`role`, `content`), which a chat template makes a text of, or a list of token
ids, which are used as they are. A string gets what the tokenizer puts before every text, an answer the end of document.
Special tokens that stand in a string are text. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, NoReturn

from megalite.text.chat import ChatTemplate, TemplateProblem
from megalite.text.foreign import shorten
from megalite.text.leading import leading_ids
from megalite.text.records import EMPTY_ANSWER, MISSING_KEY, NO_TEMPLATE, NOTHING_TO_LEARN, WRONG_FIELD
from megalite.text.tokenizers import Tokenizer

Format = Literal["sft", "preference", "prompt"]
LARGEST_ID = 2**31 - 1


class Unusable(Exception):
    """A record that gives no example: `reason` (one of `megalite.text.records`) and what would be right."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class Example:
    """Token ids, and for each whether the model learns to write it."""

    ids: list[int]
    learn: list[bool]


@dataclass
class Encoded:
    """The examples of one record, and the columns that are kept beside them."""

    examples: list[Example]
    columns: dict[str, Any] = field(default_factory=dict)


def uses_template(record: Mapping[str, Any]) -> bool:
    """Whether a record has messages, which a chat template makes texts of."""
    return any(_is_messages(record.get(name)) for name in ("messages", "prompt", "completion", "chosen", "rejected"))


class ExampleEncoder:
    """Makes examples of records.

    Args:
        form: the format.
        tokenizer: may be None if every text is a list of ids.
        template: may be None if there are no lists of messages.
        vocab_size: ids in records must be below it; None: the tokenizer's, or any.
    """

    def __init__(
        self, form: Format, tokenizer: Tokenizer | None, template: ChatTemplate | None, vocab_size: int | None = None
    ) -> None:
        self.form, self.tokenizer, self.template = form, tokenizer, template
        self.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else LARGEST_ID)
        self._leading = list(leading_ids(tokenizer))
        self._end = [] if tokenizer is None or tokenizer.eod is None else [tokenizer.eod]

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """The examples of a record. Raises `Unusable`."""
        try:
            if self.form == "sft":
                return Encoded([self._sft(record)])
            return self._pair(record) if self.form == "preference" else self._prompt(record)
        except TemplateProblem as problem:
            raise Unusable(NO_TEMPLATE, str(problem)) from None

    def _sft(self, record: Mapping[str, Any]) -> Example:
        tools = record.get("tools") or None
        if record.get("messages") is not None:
            messages = self._messages(record, "messages")
            if not any(message["role"] == "assistant" for message in messages):
                raise Unusable(NOTHING_TO_LEARN, "field 'messages' holds no message of the assistant")
            return self._learnable(Example(*self._template("messages").example(messages, tools=tools)), "messages")
        if "prompt" not in record and "completion" not in record:
            _missing(record, "'messages', or 'prompt' and 'completion'")
        prompt = _field(record, "prompt")
        answer = _field(record, "completion")
        return self._learnable(self._answer(record, prompt, answer, "completion", tools), "completion")

    def _pair(self, record: Mapping[str, Any]) -> Encoded:
        chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
        if type(chosen) is not type(rejected):
            raise Unusable(
                WRONG_FIELD, "fields 'chosen' and 'rejected' are of two kinds; give both as text or both as lists"
            )
        prompt = record.get("prompt")
        if prompt is None:
            shared = _shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
            if not prompt:
                raise Unusable(MISSING_KEY, "no field 'prompt', and 'chosen' and 'rejected' do not begin alike")
        tools = record.get("tools") or None
        both = [
            self._learnable(self._answer(record, prompt, answer, name, tools), name)
            for name, answer in (("chosen", chosen), ("rejected", rejected))
        ]
        margin = record.get("margin")
        if margin is None:
            return Encoded(both)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise Unusable(WRONG_FIELD, f"field 'margin' holds {shorten(margin)}, not a finite number")
        return Encoded(both, {"margin": float(margin)})

    def _prompt(self, record: Mapping[str, Any]) -> Encoded:
        prompt = _field(record, "prompt")
        if _is_messages(prompt):
            messages = self._messages(record, "prompt")
            template, tools = self._template("prompt"), record.get("tools") or None
            rendered = template.render(messages, messages[-1]["role"] != "assistant", tools)
            ids, text = template.encode(rendered), rendered.text
        else:
            ids = self._ids(prompt, "prompt", self._leading)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids) if self.tokenizer else ""
        if not ids:
            raise Unusable(WRONG_FIELD, "field 'prompt' is empty; give it a text")
        return Encoded([Example(ids, [False] * len(ids))], {**record, "prompt": text})

    # Parts

    def _answer(self, record: Mapping[str, Any], prompt: Any, answer: Any, name: str, tools: Any) -> Example:
        """A prompt and the answer in field `name`, both given as text, as ids or as messages."""
        if not answer:
            raise Unusable(EMPTY_ANSWER, f"field {name!r} is empty; leave the record out or give an answer")
        if _is_messages(answer):
            first = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = self._checked(first, "prompt") + self._checked(answer, name)
            return Example(*self._template(name).example(messages, len(first), tools))
        if _is_messages(prompt):
            if not isinstance(answer, str):
                raise Unusable(WRONG_FIELD, f"field {name!r} holds ids, but 'prompt' messages; give both alike")
            messages = [*self._checked(prompt, "prompt"), {"role": "assistant", "content": answer}]
            return Example(*self._template(name).example(messages, len(messages) - 1, tools))
        before = self._ids(prompt, "prompt", self._leading)
        if isinstance(prompt, str) and isinstance(answer, str):
            after = self._continued(prompt, answer, before)
        else:
            after = self._ids(answer, name)
        if isinstance(answer, str) and after[-1:] != self._end:
            after = after + self._end
        return Example(before + after, [False] * len(before) + [True] * len(after))

    def _continued(self, prompt: str, answer: str, before: list[int]) -> list[int]:
        """Ids of an answer as the text goes on after its prompt; where a token would reach from one into the other,
        those of the answer alone, which is how it is generated."""
        whole = self._ids(prompt + answer, "prompt", self._leading)
        return whole[len(before) :] if whole[: len(before)] == before else self._ids(answer, "answer")

    def _ids(self, text: Any, name: str, leading: Sequence[int] = ()) -> list[int]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise Unusable(
                    WRONG_FIELD,
                    f"field {name!r} is a text, but no tokenizer is named (data.tokenizer, --tokenizer-model)",
                )
            return [*leading, *self.tokenizer.encode(text).tolist()]
        if isinstance(text, list) and all(type(entry) is int for entry in text):
            bad = next((entry for entry in text if not 0 <= entry < self.vocab_size), None)
            if bad is not None:
                raise Unusable(
                    WRONG_FIELD, f"field {name!r}: token id {bad} is outside the vocabulary of {self.vocab_size}"
                )
            return text
        raise Unusable(WRONG_FIELD, f"field {name!r} holds {shorten(text, 60)}; give a text, messages or token ids")

    def _messages(self, record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        return self._checked(record[name], name)

    def _checked(self, messages: Any, name: str) -> list[Mapping[str, Any]]:
        """Messages with a role each; of the assistant's at least one must say something."""
        if not isinstance(messages, list) or not messages:
            raise Unusable(WRONG_FIELD, f"field {name!r} holds {shorten(messages, 60)}; give a list of messages")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                what = f"message {number} of field {name!r} is {shorten(message, 60)}"
                raise Unusable(WRONG_FIELD, f"{what}; give an object with a role and a content")
            if message.get("content") is None and not message.get("tool_calls"):
                raise Unusable(WRONG_FIELD, f"message {number} of field {name!r} has no 'content'")
            if message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls"):
                raise Unusable(EMPTY_ANSWER, f"message {number} of field {name!r} is an empty answer; leave it out")
        return messages

    def _template(self, name: str) -> ChatTemplate:
        if self.template is None:
            raise Unusable(
                NO_TEMPLATE,
                f"field {name!r} holds messages, and the tokenizer has no chat template; name a file or chatml"
                " (data.chat_template, --chat-template)",
            )
        return self.template

    def _learnable(self, example: Example, name: str) -> Example:
        if not any(example.learn[1:]):
            raise Unusable(NOTHING_TO_LEARN, f"field {name!r}: no token of it can be learned")
        return example


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        _missing(record, repr(name))
    return record[name]


def _missing(record: Mapping[str, Any], what: str) -> NoReturn:
    raise Unusable(MISSING_KEY, f"no field {what}; fields there: {', '.join(map(repr, record)) or 'none'}")


def _shared(first: Any, second: Any) -> int:
    """How much two texts or lists begin alike, with something left of both; a text is cut before a space."""
    most = max(min(len(first), len(second)) - 1, 0)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first[:most], second[:most])))
    if isinstance(first, str) and shared and first[shared - 1] == " ":
        shared -= 1
    return shared

"""Chat templates: a conversation as token ids, and which of them the model is to learn to write.

A template is a Jinja program with the conventions of Hugging Face (`chat_template` of a tokenizer_config.json): it
gets `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and `tools`, may call `raise_exception` and
`strftime_now`, and may mark what the model writes with `{% generation %} … {% endgeneration %}`. It runs in Jinja's
sandbox.

Special tokens that the template itself writes become these tokens. Those that stand in a message are encoded like any
other text, so no message can end its turn or begin another. Nothing is added to what the template writes: whether a
text begins with `bos_token` is its decision.

Does not import torch.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalite.errors import UserError
from megalite.text.foreign import read_small_file, shorten
from megalite.text.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.text.tokenizers import TEMPLATE_FILE, Tokenizer

LARGEST_TEMPLATE = 4 << 20
BUILT_IN = "chatml"

# Characters that Unicode reserves for a program's own use; those in a message become U+FFFD before it is rendered.
_BROKEN, _BEGIN, _END, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_RESERVED = re.compile(f"[{_BROKEN}{_BEGIN}{_END}{_PROBE}]")

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else -%}
{{ message.content + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
# For tokenizers without these two tokens: the end of a turn is the end of a document, which no message can forge.
_PLAIN = """\
{%- set end = eos_token | default('<|end|>', true) -%}
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + end }}{% endgeneration %}
{%- else -%}
{{ message.content + end }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>\\n' }}
{%- endif -%}
"""

Message = Mapping[str, Any]


class TemplateProblem(ValueError):
    """A template cannot render these messages, or the learn mask cannot be told; one line that says why."""


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` of a template raises."""


class _Generation(Extension):
    """`{% generation %}`: its text is put between two marks, which are taken out of what is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END))
        return nodes.Scope([begin, *body, end], lineno=line)


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. `raw` may hold the mark that breaks special tokens in messages, and no other.

    `spans` are the parts of `raw` inside `{% generation %}`, as (start, stop).
    """

    raw: str
    spans: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        return self.raw.replace(_BROKEN, "")


class ChatTemplate:
    """A template together with the tokenizer that encodes what it writes; `load` finds it.

    Attributes:
        source: the template's text, from which `ChatTemplate(tokenizer, source)` makes the same again.
        sha256: its hash (hex).
        name: where it came from, for messages.
        stop_ids: tokens that end the assistant's turn.
        stop_strings: texts that end it, for a template whose turns end in plain text.
        marked: whether the template says itself what is learned, by `{% generation %}`.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, name: str = "chat template") -> None:
        self.tokenizer, self.source, self.name = tokenizer, source, name
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self._special = dict(tokenizer.special_tokens)
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._finder = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        names = {number: text for text, number in self._special.items()}
        self._variables = {
            f"{kind}_token": names[number]
            for kind, number in (("bos", tokenizer.bos), ("eos", tokenizer.eod))
            if number is not None and number in names
        }
        environment = _environment()
        try:
            self.marked = any(token == "generation" for _, kind, token in environment.lex(source) if kind == "name")
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"{name}{line}: not a Jinja template ({shorten(error)})") from None
        self.stop_ids, self.stop_strings = self._ends_of_turn()

    @classmethod
    def load(cls, tokenizer: Tokenizer, name_or_path: str | Path = "") -> ChatTemplate:
        """The template of a file (Jinja, or JSON with a `chat_template`), `chatml` (built in), or, for an empty name,
        the tokenizer's own. Raises `UserError`."""
        template = cls.find(tokenizer, name_or_path)
        if template is None:
            where = tokenizer.files[0] if tokenizer.files else f"a {tokenizer.kind} tokenizer"
            raise UserError(
                f"{where} has no chat template; name a file, or {BUILT_IN}, the built-in one"
                " (data.chat_template, --chat-template)"
            )
        return template

    @classmethod
    def find(cls, tokenizer: Tokenizer, name_or_path: str | Path = "") -> ChatTemplate | None:
        """As `load`, but None where the tokenizer has none of its own and no other is named."""
        if str(name_or_path) == BUILT_IN:
            tokens = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
            return cls(tokenizer, _CHATML if tokens else _PLAIN, BUILT_IN)
        if str(name_or_path):
            path = Path(name_or_path)
            source = _read(path)
            if source is None:
                raise UserError(f"chat template {path}: holds no chat_template; give a Jinja file")
            return cls(tokenizer, source, str(path))
        if tokenizer.files:
            folder = tokenizer.files[0].parent
            for file in (TEMPLATE_FILE, "chat_template.json", "tokenizer_config.json"):
                if (folder / file).is_file() and (source := _read(folder / file)) is not None:
                    return cls(tokenizer, source, str(folder / file))
        return None

    # Rendering

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> Rendered:
        """The text of a conversation. Raises `TemplateProblem` if the template refuses or fails."""
        return self._render(self._guarded(list(messages)), add_generation_prompt, tools)

    def ids(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation; with `add_generation_prompt` up to where the assistant's answer begins."""
        return self.encode(self.render(messages, add_generation_prompt, tools))

    def encode(self, rendered: Rendered) -> list[int]:
        """Token ids of what `render` returned."""
        return self._encode(rendered.raw, _BROKEN in rendered.raw).tolist()

    def example(
        self, messages: Sequence[Message], first: int = 0, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the model learns to write it.

        Learned are the assistant's messages from number `first` on, each with the token that ends its turn: what
        `{% generation %}` holds or, in a template without it, what comes after the generation prompt. Both are found by
        encoding the text up to there and comparing token ids.

        Raises:
            TemplateProblem: the template cannot render the messages, or does not let it be told what is learned; the
                message's number is named.
        """
        guarded = self._guarded(list(messages))
        whole = self._render(guarded, False, tools)
        answers = [n for n, message in enumerate(messages) if n >= first and message.get("role") == "assistant"]
        if self.marked:
            spans = self._marked_spans(messages, whole, answers)
        else:
            spans = [self._span(guarded, whole.raw, number, tools) for number in answers]
        apart = _BROKEN in whole.raw
        ids = self._encode(whole.raw, apart)
        learn = np.zeros(len(ids), bool)
        for number, (start, stop) in zip(answers, spans, strict=True):
            learn[
                self._place(whole.raw, start, ids, apart, number) : self._place(whole.raw, stop, ids, apart, number)
            ] = 1
        return ids.tolist(), learn.tolist()

    def _render(self, guarded: Any, add_generation_prompt: bool, tools: Sequence[Any] | None) -> Rendered:
        try:
            marked = self._template.render(
                messages=guarded,
                add_generation_prompt=add_generation_prompt,
                tools=self._guarded(tools),
                documents=None,
                **self._variables,
            )
        except _Refusal as error:
            raise TemplateProblem(f"the chat template {self.name} says: {shorten(str(error)).strip(chr(39))}") from None
        except Exception as error:  # whatever a program of somebody else's may raise
            raise TemplateProblem(f"the chat template {self.name} fails on it ({shorten(error)})") from None
        parts, spans, at, begun = [], [], 0, -1
        for part in re.split(f"([{_BEGIN}{_END}])", marked):
            if part == _BEGIN:
                begun = at
            elif part == _END:
                spans.append((begun, at))
            else:
                parts.append(part)
                at += len(part)
        return Rendered("".join(parts), tuple(spans))

    def _guarded(self, value: Any) -> Any:
        """A copy in which no string holds a special token or a reserved character; entries that are None are left
        out, since a table has every field in every row."""
        if isinstance(value, str):
            value = _RESERVED.sub("\ufffd", value)
            return (
                self._finder.sub(lambda found: found[0][0] + _BROKEN + found[0][1:], value) if self._finder else value
            )
        if isinstance(value, Mapping):
            return {key: self._guarded(entry) for key, entry in value.items() if entry is not None}
        if isinstance(value, list | tuple):
            return [self._guarded(entry) for entry in value]
        return value

    # Ids

    @functools.cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer that makes no special token of text."""
        return self._as(allow_special=False)

    @functools.cached_property
    def _library(self) -> Tokenizer:
        """The one that does."""
        return self._as(allow_special=True)

    def _as(self, allow_special: bool) -> Tokenizer:
        given = self.tokenizer
        if isinstance(given, HuggingFaceTokenizer) and given.allow_special != allow_special:
            return HuggingFaceTokenizer(given.files[0], allow_special=allow_special)
        return given

    def _encode(self, raw: str, apart: bool) -> np.ndarray:
        """Ids of rendered text, int32.

        Where no message holds a special token (`apart` False) a Hugging Face tokenizer encodes all of it at once, as
        transformers does. Otherwise, and for tokenizers that make no special token of text, the special tokens are
        taken out and what is between them is encoded as plain text.
        """
        if self.tokenizer.kind == "huggingface" and not apart:
            return self._library.encode(raw)
        parts: list[np.ndarray] = []
        at = 0
        for found in self._finder.finditer(raw) if self._finder else ():
            parts += (self._plain_ids(raw[at : found.start()]), np.array([self._special[found[0]]], np.int32))
            at = found.end()
        return np.concatenate([*parts, self._plain_ids(raw[at:])])

    def _plain_ids(self, text: str) -> np.ndarray:
        text = text.replace(_BROKEN, "")
        return self._plain.encode(text) if text else np.empty(0, np.int32)

    def _place(self, raw: str, position: int, ids: np.ndarray, apart: bool, number: int) -> int:
        """How many of `ids` the text up to `position` makes."""
        before = self._encode(raw[:position], apart)
        if not np.array_equal(before, ids[: len(before)]):
            around = raw[max(0, position - 12) : position + 12].replace(_BROKEN, "")
            raise TemplateProblem(
                f"message {number}: a token reaches across the place where the model begins or ends to write"
                f" ({shorten(around)}), so the chat template {self.name} gives no learn mask; put a special token or a"
                " line break there"
            )
        return len(before)

    # What is learned

    def _marked_spans(
        self, messages: Sequence[Message], whole: Rendered, answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        every = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
        if len(whole.spans) != len(every):
            raise TemplateProblem(
                f"the chat template {self.name} marks {len(whole.spans)} parts by generation blocks in a conversation"
                f" with {len(every)} answers; mark each answer once"
            )
        return [span for number, span in zip(every, whole.spans, strict=True) if number in set(answers)]

    def _span(self, guarded: list[Any], whole: str, number: int, tools: Sequence[Any] | None) -> tuple[int, int]:
        """Where answer `number` stands in the text, with the end of its turn.

        It begins where the text up to it with a generation prompt ends. To find its end it is replaced by a mark: what
        follows the mark, rendered as the last message, is the end of a turn; in the whole conversation it is all that
        follows the answer.
        """
        prompt = self._render(guarded[:number], True, tools).raw
        if not whole.startswith(prompt):
            raise TemplateProblem(
                f"message {number}: the chat template {self.name} writes a conversation differently once it is answered"
                " than for generation, and has no generation blocks, so it gives no learn mask"
            )
        probe = {**guarded[number], "content": _PROBE}
        ending = self._render([*guarded[:number], probe], False, tools).raw.partition(_PROBE)
        around = self._render([*guarded[:number], probe, *guarded[number + 1 :]], False, tools).raw.rpartition(_PROBE)
        if not ending[1] or not around[1]:
            self._hides(number)
        end = ending[2] if around[2].startswith(ending[2]) else ""
        if not whole.endswith(around[2]):
            self._hides(number)
        stop = len(whole) - len(around[2]) + len(self._written(end))
        if stop <= len(prompt):
            self._hides(number)
        return len(prompt), stop

    def _hides(self, number: int) -> NoReturn:
        raise TemplateProblem(f"message {number}: the chat template {self.name} does not write this answer")

    def _written(self, ending: str) -> str:
        """Of what follows an answer the part that the model writes: up to its first special token, without the space
        after it."""
        found = self._finder.search(ending) if self._finder else None
        return ending[: found.end()] if found else ending.rstrip()

    def _ends_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        end_of_text = () if self.tokenizer.eod is None else (self.tokenizer.eod,)
        question = {"role": "user", "content": "?"}
        try:
            rendered = self._render([question, {"role": "assistant", "content": _PROBE}], False, None).raw
        except TemplateProblem:
            return end_of_text, ()
        ending = self._written(rendered.rpartition(_PROBE)[2]) if _PROBE in rendered else ""
        found = self._finder.search(ending) if self._finder else None
        if found:
            return tuple(dict.fromkeys((self._special[found[0]], *end_of_text))), ()
        return end_of_text, (ending.strip(),) if ending.strip() else ()


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it. `strftime_now` tells the time at which the template was loaded, so that one
    conversation is one text throughout."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    now = datetime.datetime.now()

    def refuse(message: str) -> NoReturn:
        raise _Refusal(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime
    return environment


def _read(path: Path) -> str | None:
    """The template in a file: all of it or, of a JSON file, its `chat_template` (the one called default of several);
    None for a JSON file without one."""
    try:
        content = read_small_file(path, LARGEST_TEMPLATE if path.suffix != ".json" else 64 << 20).decode()
    except OSError as error:
        raise UserError(f"chat template {path}: cannot be read ({error.strerror}); give a Jinja file") from None
    except UnicodeDecodeError:
        raise UserError(f"chat template {path}: not UTF-8; give a Jinja file") from None
    if path.suffix != ".json":
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"chat template {path}: not JSON ({shorten(error)})") from None
    template = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"chat template {path}: chat_template = {shorten(template)} is not text")
    return template

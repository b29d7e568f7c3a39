"""The service in terms of texts: tokens as lm-evaluation-harness makes them for a Hugging Face model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megalite.errors import UserError
from megalite.evaluation.request_packing import Request
from megalite.evaluation.service import Advance, Service, unheard
from megalite.generation.loading import Opened
from megalite.generation.sampling import Sampling
from megalite.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megalite.text.chat import ChatTemplate

Pair = tuple[str, str]
"""(context, continuation)."""

NO_TOKENIZER = "give --tokenizer FILE: questions are texts"


class TextModel:
    """A service and a tokenizer; `bos` is what the tokenizer puts before every text, `eos` what ends one.

    Raises UserError for a tokenizer without a token that begins or ends a text.
    """

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        bos: Sequence[int],
        eos: Sequence[int],
        name: str = "",
        chat_template: Callable[[], ChatTemplate] | None = None,
    ) -> None:
        self.service, self.tokenizer, self.bos, self.eos, self.name = service, tokenizer, list(bos), tuple(eos), name
        self._chat_template = chat_template
        start = tokenizer.bos if tokenizer.bos is not None else next(iter(self.eos), None)
        if start is None:
            raise UserError(f"the {tokenizer.kind} tokenizer {name} has no token that begins or ends a text")
        self.prefix = start
        """What a text without a context follows."""

    @classmethod
    def of(cls, service: Service, opened: Opened) -> TextModel:
        """With the checkpoint's tokenizer and chat template. Raises UserError for a checkpoint without a tokenizer."""
        tokenizer = opened.require_tokenizer(NO_TOKENIZER)
        template = functools.cache(opened.chat_template)
        return cls(service, tokenizer, opened.bos, opened.eos, str(opened.directory), template)

    def encode(self, texts: Sequence[str], *, bare: bool = False) -> list[list[int]]:
        """Token ids, behind what the tokenizer puts before every text (unless `bare`, or the text itself begins so)."""
        rows = [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]
        if bare or not self.bos:
            return rows
        return [row if row[: len(self.bos)] == self.bos else self.bos + row for row in rows]

    def check_fit(self, questions: Sequence[tuple[str, str]], new_tokens: int = 0) -> None:
        """Raise UserError if one of the (name, text) is too long, with so many new tokens behind it. Worked examples
        in front of a question may be cut, the question may not."""
        room = self.service.longest - new_tokens
        for (name, _), row in zip(questions, self.encode([text for _, text in questions])):
            if len(row) > room:
                behind = f"with max-new-tokens = {new_tokens} that is" if new_tokens else "that is"
                fewer = "ask for fewer tokens (--max-new-tokens), " if new_tokens else ""
                raise UserError(
                    f"{name}: the question has {len(row)} tokens; {behind} more than the model's "
                    f"model.max_positions = {self.service.longest}: {fewer}leave it out (--limit, --subjects), or use "
                    "a model that reads more"
                )

    def requests(self, pairs: Sequence[Pair]) -> list[Request]:
        """Token ids of contexts and continuations. The two are encoded together and cut where the context alone ends;
        spaces at a context's end belong to the continuation."""
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + more) for context, more in pairs]
        moved = [(context, more) if context else pair for pair, (context, more) in zip(pairs, moved)]
        texts = list(dict.fromkeys(text for context, more in moved if context for text in (context, context + more)))
        ids = dict(zip(texts, self.encode(texts)))
        return [
            (ids[context], ids[context + more][len(ids[context]) :]) if context else self._after_nothing(more)
            for context, more in moved
        ]

    def _after_nothing(self, continuation: str) -> Request:
        (ids,) = self.encode([continuation], bare=True)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)

    def loglikelihoods(self, pairs: Sequence[Pair], advance: Advance = unheard) -> list[tuple[float, bool]]:
        """See `Service.loglikelihoods`. A continuation without tokens of its own has the log-likelihood 0."""
        requests = self.requests(pairs)
        asked = [request for request in requests if len(request[1])]
        found = iter(self.service.loglikelihoods(asked, advance))
        return [next(found) if len(request[1]) else (0.0, True) for request in requests]

    def rolling(self, texts: Sequence[str], advance: Advance = unheard) -> list[float]:
        """See `Service.rolling`."""
        return self.service.rolling(self.encode(texts), self.prefix, advance)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        sampling: Sampling | None = None,
        advance: Advance = unheard,
    ) -> list[str]:
        """The text after each prompt, greedy unless `sampling` says otherwise; see `Service.generate`."""
        rows = [row or [self.prefix] for row in self.encode(prompts)]
        greedy = Sampling(temperature=0.0)
        return self.service.generate(rows, sampling or greedy, max_new_tokens, stop_strings, self.eos, advance)

    def chat_template(self) -> ChatTemplate:
        """The checkpoint's, read once. Raises UserError where it has none."""
        assert self._chat_template is not None, "only a model `of` a checkpoint has one"
        return self._chat_template()

    def chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the generation prompt it ends where the last message does, to be gone on
        with. Raises UserError for a conversation that the template refuses."""
        from megalite.text.chat import TemplateProblem  # loads Jinja, which text alone does not need

        try:
            text = self.chat_template().render(messages, add_generation_prompt).text
        except TemplateProblem as error:
            raise UserError(f"--chat: {error}") from None
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)]

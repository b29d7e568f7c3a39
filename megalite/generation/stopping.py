"""When a text ends, and which part of it may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.text.tokenizers import IncrementalDecoder, Tokenizer


class TextStream:
    """The text of one row as it grows, cut before the first stop string.

    What could be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._shown = 0
        self.text = ""
        self.stopped = False

    def prime(self, prompt: Sequence[int]) -> None:
        """Decode the prompt first, so that the continuation decodes as in the middle of a text."""
        for token in prompt:
            self._decoder.feed(token)

    def feed(self, token: int) -> str:
        """Add a token; the text that can be shown now, maybe none."""
        return self._add(self._decoder.feed(token))

    def finish(self) -> str:
        """No token follows: the rest of the text."""
        shown = "" if self.stopped else self._add(self._decoder.finish())
        rest, self._shown = self.text[self._shown :], len(self.text)
        return shown + rest

    def _add(self, piece: str) -> str:
        searched = max(0, len(self.text) - max(map(len, self._stops), default=0))
        self.text += piece
        places = [place for stop in self._stops if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        ready = len(self.text) if self.stopped else len(self.text) - self._possible_stop()
        shown = self.text[self._shown : ready]
        self._shown = max(self._shown, ready)
        return shown

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0

"""Text that need not be well formed, and tokens to be found in it."""

import re
from collections.abc import Sequence

_SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair: what Python makes of bytes that are not UTF-8."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return _SURROGATE.sub("\ufffd", text)


class TokenFinder:
    """Finds strings, such as special tokens, in texts that mostly hold none."""

    def __init__(self, contents: Sequence[str]) -> None:
        longest_first = sorted(filter(None, contents), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        starts = {content[0] for content in longest_first}
        self._start = starts.pop() if len(starts) == 1 else ""  # a look for one character is far cheaper

    def found_in(self, text: str) -> bool:
        return self._pattern is not None and self._start in text and self._pattern.search(text) is not None

    def count(self, text: str) -> int:
        """Number of non-overlapping occurrences of any of the strings in the text."""
        return len(self._pattern.findall(text)) if self._pattern is not None and self._start in text else 0

"""Regular expressions in tokenizer files: finding them, and detecting catastrophic backtracking."""

import re
from collections.abc import Iterator
from typing import Any

# A repetition without bound, of what stands before it; "+" behind a quantifier only makes it possessive
_UNBOUNDED = re.compile(r"[*+]|\{\d+,\}")
_CLASS_PART = re.compile(r"\\.|\[|\]|[^\\\[\]]+", re.DOTALL)


def regular_expressions(description: Any) -> Iterator[str]:
    """Every `{"Regex": …}` in the description of a tokenizer."""
    if isinstance(description, dict):
        if isinstance(description.get("Regex"), str):
            yield description["Regex"]
        for name, value in description.items():
            if name not in ("vocab", "merges", "added_tokens"):
                yield from regular_expressions(value)
    elif isinstance(description, list):
        for value in description:
            yield from regular_expressions(value)


def may_take_forever(expression: str) -> bool:
    """Whether a group that holds an unbounded repetition is itself repeated without bound, such as `(a+)*`.

    Such an expression may try every way of cutting a run of characters in parts: exponential time.
    """
    repeats = [False]  # for each open group: whether it holds an unbounded repetition
    position = 0
    while position < len(expression):
        character = expression[position]
        closed = False
        if character == "[":
            position = _end_of_class(expression, position)
        elif character == "\\":
            position += 2
        else:
            position += 1
            if character == "(":
                repeats.append(False)
                continue
            if character == ")" and len(repeats) > 1:
                closed = repeats.pop()
                repeats[-1] |= closed
        if match := _UNBOUNDED.match(expression, position):
            if closed:
                return True
            repeats[-1] = True
            position = match.end()
    return False


def _end_of_class(expression: str, start: int) -> int:
    """The position behind a character class; classes may hold others."""
    depth = 0
    for part in _CLASS_PART.finditer(expression, start):
        depth += (part.group() == "[") - (part.group() == "]")
        if depth == 0:
            return part.end()
    return len(expression)

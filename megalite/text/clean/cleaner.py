"""Cleaning a corpus: each unit of the input becomes a shard of kept documents, and their counts become the report."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from megalite.errors import UserError
from megalite.files import write_atomically, write_errors_named
from megalite.text.clean import classifiers, filters
from megalite.text.clean.filters import Page, Rejection
from megalite.text.clean.privacy import mask
from megalite.text.clean.rules import LARGEST_FILE, Rules
from megalite.text.clean.segment import load_segmenter
from megalite.text.foreign import read_small_file, shorten
from megalite.text.jobs import Unit, fingerprint, map_tasks, noted, plan_units
from megalite.text.records import MAX_RECORD_BYTES, Document
from megalite.text.shards import Unusable, open_output, open_shards, read_unit
from megalite.text.words import WordNumbers

BINS_PER_OCTAVE = 4  # of the histograms of sizes
BINS_PER_CHARACTER = 4  # of the histogram of mean word lengths
MAX_BIN = 160


@dataclass
class Counts:
    """What happened to the documents of a unit, or of all of them. Histograms: name -> bin -> documents."""

    documents: int = 0
    kept: int = 0
    characters: int = 0
    kept_characters: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejected_characters: dict[str, int] = field(default_factory=dict)
    removed_lines: dict[str, int] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, dict[str, int]] = field(default_factory=dict)

    def include(self, other: dict[str, Any]) -> None:
        """Add the counts of another unit, given as `asdict` made them."""
        for name, value in other.items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif name == "histograms":
                for histogram, bins in value.items():
                    _add(self.histograms.setdefault(histogram, {}), bins)
            else:
                _add(getattr(self, name), value)

    def observe(self, page: Page, kept: bool) -> None:
        """Add a page as it was read to the histograms."""
        verdict = "kept" if kept else "rejected"
        for name, value in (
            ("characters", int(math.log2(len(page.text) + 1) * BINS_PER_OCTAVE)),
            ("words", int(math.log2(len(page.words) + 1) * BINS_PER_OCTAVE)),
            ("mean_word_length", int(page.mean_word_length * BINS_PER_CHARACTER)),
        ):
            _add(self.histograms.setdefault(f"{name}/{verdict}", {}), {str(min(value, MAX_BIN)): 1})


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0) + count


class Cleaner:
    """The rule groups in the user's order, ready to be applied to one text after another."""

    def __init__(self, rules: Rules) -> None:
        """Raises UserError if a model or word file that a group needs is missing."""
        self.rules = rules
        self._numbers = WordNumbers()
        self._segmenter = load_segmenter(rules.words)
        self.bad_words = _bad_words(rules.c4.bad_words_file) if "c4" in rules.rules else None
        for group in ("language", "quality"):
            if group in rules.rules:
                classifiers.load_classifier(getattr(rules, group).model, group)

    def page(self, text: str) -> Page:
        """A text as the rules look at it."""
        return Page(text, self._numbers, self._segmenter)

    def apply(self, page: Page, counts: Counts) -> Page | Rejection:
        """The cleaned page, or the first rule it breaks. Counts removed lines and masked addresses of kept pages."""
        removed_lines: dict[str, int] = {}
        masked: dict[str, int] = {}
        for group in self.rules.rules:
            values = getattr(self.rules, group)
            outcome: Page | Rejection | None
            if group == "c4":
                outcome = filters.c4(page, values, self.bad_words, removed_lines)
            elif group == "privacy":
                outcome = page.with_text(mask(page.text, values, masked))
            else:
                outcome = getattr(classifiers if group in ("language", "quality") else filters, group)(page, values)
            if isinstance(outcome, Rejection):
                return outcome
            page = outcome or page
        _add(counts.removed_lines, removed_lines)
        _add(counts.masked, masked)
        return page


def _bad_words(path: str) -> re.Pattern[str] | None:
    if not path:
        return None
    try:
        words = [line.strip() for line in read_small_file(path, LARGEST_FILE).decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else shorten(error)
        raise UserError(f"[c4] bad_words_file = {path!r} cannot be read ({reason}): give a UTF-8 file") from None
    alternatives = "|".join(re.escape(word) for word in sorted(filter(None, words), key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE) if alternatives else None


@dataclass(frozen=True)
class CleanTask:
    """All that a worker needs for one unit."""

    unit: Unit
    output: Path
    key: str
    rules: Rules
    keep_rejected: bool
    max_record_bytes: int = MAX_RECORD_BYTES


@noted("clean")
def clean_unit(task: CleanTask) -> dict[str, Any]:
    """Clean one unit into its shard.

    Returns:
        `counts` and `unusable`, as plain values.
    """
    cleaner, counts, unusable = Cleaner(task.rules), Counts(), Unusable()
    with open_shards(task.output, task.unit, task.keep_rejected) as (shard, rejected):
        for document, outcome in _outcomes(task, cleaner, counts, unusable):
            if isinstance(outcome, Page):
                shard.write({**document.extra, task.key: outcome.text})
            elif rejected is not None:
                reason = {"rejected_by": outcome.rule, "rejected_value": outcome.value}
                rejected.write({**document.extra, task.key: document.text, **reason})
    return {"counts": asdict(counts), "unusable": asdict(unusable)}


def _outcomes(
    task: CleanTask, cleaner: Cleaner, counts: Counts, unusable: Unusable
) -> Iterator[tuple[Document, Page | Rejection]]:
    """Every document of the unit with its cleaned page or its rejection, counted."""
    for _, document in read_unit(task.unit, task.key, unusable, True, task.max_record_bytes):
        page = cleaner.page(document.text)
        outcome = cleaner.apply(page, counts)
        counts.documents += 1
        counts.characters += len(document.text)
        if isinstance(outcome, Page):
            counts.kept += 1
            counts.kept_characters += len(outcome.text)
        else:
            _add(counts.rejected, {outcome.rule: 1})
            _add(counts.rejected_characters, {outcome.rule: len(document.text)})
        counts.observe(page, isinstance(outcome, Page))
        yield document, outcome


def clean_corpus(
    paths: list[Path],
    output: Path,
    rules: Rules,
    key: str = "text",
    workers: int = 1,
    keep_rejected: bool = False,
    max_bad_ratio: float = 0.01,
    allow_damaged: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> tuple[Counts, Unusable]:
    """Clean files into `output`: a `.jsonl.zst` shard a unit, `rules.toml` and, if wanted, `rejected/`.

    An interrupted run resumes where it stopped when called again with the same input and rules.

    Raises:
        UserError: unusable input (see `Unusable.check`), models or output directory.
    """
    Cleaner(rules)
    units = plan_units(paths)
    open_output(output, fingerprint(units, [rules.as_dict(), key, keep_rejected, max_record_bytes]))
    with write_errors_named(output / "rules.toml"):
        write_atomically(output / "rules.toml", tomli_w.dumps(rules.as_dict()))
    tasks = [CleanTask(unit, output, key, rules, keep_rejected, max_record_bytes) for unit in units]
    counts, unusable = Counts(), Unusable()
    for result in map_tasks(clean_unit, tasks, workers, "cleaning", [unit.bytes for unit in units]):
        counts.include(result["counts"])
        unusable.include(result["unusable"])
    unusable.check(counts.documents, max_bad_ratio, allow_damaged)
    return counts, unusable

"""The cleaning rules against datatrove's, on the same real documents: how often both keep or reject, and why not.

Each group is applied by itself, then all in FineWeb's order, with FineWeb's definitions (`fineweb.toml`) and with the
defaults. Needs datatrove and spaCy (`pip install -e '.[compare]'`), which nothing else in this repository uses.

    python benchmarks/cleaning.py --input corpus/*.jsonl.gz
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

import megalite.text.clean
from megalite.cli import program
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.text.clean.cleaner import Cleaner, Counts
from megalite.text.clean.filters import Rejection
from megalite.text.clean.rules import Rules, load_rules
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents

ROOT = Path(__file__).parent.parent
FINEWEB = Path(megalite.text.clean.__file__).with_name("fineweb.toml")
GROUPS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
EXAMPLES = 5  # documents named for each pair of reasons


@dataclass(frozen=True)
class Options:
    """Compare cleaning with datatrove and write a JSON file."""

    input: list[str]
    """Text, as for clean_data.py."""
    documents: int = 400
    """Taken at even distances from all inputs."""
    key: str = "text"
    """Field that holds the text."""
    output: Path = ROOT / "benchmarks" / "results" / "cleaning.json"
    """Where the result goes."""


Judge = Callable[[str], str | None]  # the reason why a text is rejected, or None


def datatrove_judges() -> dict[str, Judge]:
    """datatrove's filters with FineWeb's settings, each by itself and all in order, as FineWeb ran them."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters
        from loguru import logger
    except ImportError as error:
        raise UserError(f"datatrove is not installed ({error}): pip install -e '.[compare]'") from None
    logger.remove()
    made = {
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "gopher_quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb": filters.FineWebQualityFilter(),
    }

    def judge(groups: Iterable[str]) -> Judge:
        def reason(text: str) -> str | None:
            document = Document(text=text, id="")
            for group in groups:
                outcome = made[group].filter(document)
                if outcome is not True:
                    return outcome[1] if isinstance(outcome, tuple) else group
            return None

        return reason

    return {**{group: judge([group]) for group in GROUPS}, "all": judge(GROUPS)}


def megalite_judges(rules: Rules) -> dict[str, Judge]:
    def judge(groups: Iterable[str]) -> Judge:
        cleaner = Cleaner(replace(rules, rules=list(groups)))

        def reason(text: str) -> str | None:
            outcome = cleaner.apply(cleaner.page(text), Counts())
            return outcome.rule if isinstance(outcome, Rejection) else None

        return reason

    return {**{group: judge([group]) for group in GROUPS}, "all": judge(GROUPS)}


def verdicts(judges: dict[str, Judge], texts: dict[str, str]) -> tuple[dict[str, dict[str, str | None]], float]:
    """For each group and document the reason, and the CPU seconds that took."""
    started = time.process_time()
    found = {group: {name: judge(text) for name, text in texts.items()} for group, judge in judges.items()}
    return found, round(time.process_time() - started, 2)


def compare(mine: dict[str, str | None], theirs: dict[str, str | None]) -> dict[str, Any]:
    """How often both decide alike, and the documents in which they do not, by the two reasons."""
    pairs: Counter[tuple[str | None, str | None]] = Counter()
    examples: dict[tuple[str | None, str | None], list[str]] = {}
    for name in mine:
        if (mine[name] is None) != (theirs[name] is None):
            pair = mine[name], theirs[name]
            pairs[pair] += 1
            examples.setdefault(pair, []).append(name)
    same = len(mine) - sum(pairs.values())
    return {
        "same_decision": same,
        "share": round(same / len(mine), 4),
        "kept_by_megalite": sum(reason is None for reason in mine.values()),
        "kept_by_datatrove": sum(reason is None for reason in theirs.values()),
        "differences": [
            {"megalite": pair[0], "datatrove": pair[1], "documents": count, "examples": examples[pair][:EXAMPLES]}
            for pair, count in pairs.most_common()
        ],
    }


def sample(inputs: list[str], count: int, key: str) -> dict[str, str]:
    """`count` texts at even distances, by file and number of the document."""
    named = {
        f"{path.name}:{number}": document.text
        for path in expand_inputs(inputs)
        for number, document in enumerate(read_documents(path, key, on_bad=lambda _: None))
    }
    if not named:
        raise UserError(f"--input {' '.join(inputs)}: no document has text in field {key!r}")
    names = list(named)
    step = max(1.0, len(names) / count)
    return {names[int(at * step)]: named[names[int(at * step)]] for at in range(min(count, len(names)))}


@program
def main() -> None:
    options = tyro.cli(Options)
    if options.documents < 1:
        raise UserError(f"--documents {options.documents}: must be at least 1")
    texts = sample(options.input, options.documents, options.key)
    theirs, their_seconds = verdicts(datatrove_judges(), texts)
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/cleaning.py", *sys.argv[1:]]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("datatrove", "spacy", "numpy")},
        "python": platform.python_version(),
        "documents": len(texts),
        "megabytes": round(sum(len(text.encode()) for text in texts.values()) / 1e6, 2),
        "cpu_seconds_datatrove": their_seconds,
    }
    for name, rules in (("fineweb_definitions", load_rules(FINEWEB)), ("default_definitions", load_rules())):
        mine, seconds = verdicts(megalite_judges(rules), texts)
        groups = {group: compare(mine[group], theirs[group]) for group in mine}
        report[name] = {"cpu_seconds": seconds, **groups}
        for group, row in groups.items():
            print(f"{name:20s} {group:18s} {row['same_decision']:5d} of {len(texts)}  {row['share']:.1%}")
    write_atomically(options.output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

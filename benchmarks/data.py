"""CPU seconds of preprocessing against its peers, on the same text in one run.

CPU seconds of a process and its children are compared, as ratios: they hold on a busy machine where wall time does not.
Peers: Megatron-LM's loop (a pool that reads, parses and encodes one document at a time, a parent that packs lists) and
a plain loop over the tokenizer's library. Start-up is taken off by running each program on one document, too.

    python benchmarks/data.py --input corpus/*.jsonl.gz --megabytes 16
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megalite.cli import program
from megalite.errors import UserError
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents
from megalite.text.tokenizer_training import TrainingOptions, train

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "data.json"


@dataclass(frozen=True)
class Options:
    """Measure preprocessing against its peers and write benchmarks/results/data.json."""

    input: list[str]
    """Text, as for preprocess_data.py."""
    megabytes: float = 16.0
    """Of text, taken from the beginning of every input in turn."""
    vocab_size: int = 8000
    """Of both tokenizers, which are trained on the text itself."""
    repeats: int = 2
    """The smallest CPU time of this many runs counts."""


def worker_start(kind: str, model: str) -> None:
    """Per-process state of the peers' loop, as Megatron-LM's `Encoder.initializer` keeps it."""
    worker_start.encode = encoder(kind, model)  # type: ignore[attr-defined]


def worker_encode(line: str) -> list[int]:
    ids = worker_start.encode(json.loads(line)["text"])  # type: ignore[attr-defined]
    return [*ids, 2]


def encoder(kind: str, model: str) -> Any:
    if kind == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=model).encode
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(model)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def megatron_like(corpus: str, kind: str, model: str, output: str) -> None:
    with (
        open(corpus, encoding="utf-8") as lines,
        open(output, "wb") as out,
        multiprocessing.get_context("fork").Pool(1, worker_start, (kind, model)) as pool,
    ):
        for ids in pool.imap(worker_encode, lines, 32):
            out.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))


def plain_loop(corpus: str, kind: str, model: str, output: str) -> None:
    encode = encoder(kind, model)
    with open(corpus, encoding="utf-8") as lines, open(output, "wb") as out:
        for line in lines:
            out.write(np.array([*encode(json.loads(line)["text"]), 2], dtype=np.uint16).tobytes())


PEERS = {"megatron_like": megatron_like, "plain_loop": plain_loop}


def cpu_seconds(command: list[str]) -> tuple[float, float]:
    """CPU seconds of a command with its children, and its wall seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - start


def commands(corpus: Path, kind: str, model: Path, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """For each program its command line and the tokens it writes."""
    mine = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), "--append-eod"]
    mine += ["--tokenizer-type", kind, "--tokenizer-model", str(model)]
    mine += ["--allow-special"] if kind == "huggingface" else []  # as the peers' loops do
    found = {}
    for workers in (1, 2):
        prefix = folder / f"megalite{workers}"
        found[f"megalite_{workers}"] = ([*mine, "--workers", str(workers), "--output-prefix", str(prefix)], prefix)
    table = {name: (command, Path(f"{prefix}_text_document.bin")) for name, (command, prefix) in found.items()}
    for peer in PEERS:
        output = folder / f"{peer}.bin"
        table[peer] = ([sys.executable, __file__, "peer", peer, str(corpus), kind, str(model), str(output)], output)
    return table


def measure(corpus: Path, single: Path, kind: str, model: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds of each program, steady state and start-up; every program must have written the same ids."""
    size = sum(len(document.text.encode()) for document in read_documents(corpus)) / 1e6
    rows: dict[str, Any] = {}
    tokens: dict[str, bytes] = {}
    small = commands(single, kind, model, folder)
    for name, (command, output) in commands(corpus, kind, model, folder).items():
        startup = min(cpu_seconds(small[name][0])[0] for _ in range(repeats))
        total = min(cpu_seconds(command)[0] for _ in range(repeats))
        tokens[name] = output.read_bytes()
        rows[name] = {"startup_cpu_s": round(startup, 3), "cpu_s_per_mb": round((total - startup) / size, 4)}
    if len(set(tokens.values())) != 1:
        raise UserError(f"{kind}: the programs disagree about the ids: {[len(data) for data in tokens.values()]} bytes")
    for row in rows.values():
        row["ratio_to_megatron_like"] = round(row["cpu_s_per_mb"] / rows["megatron_like"]["cpu_s_per_mb"], 3)
    return {"megabytes": round(size, 2), "identical_ids": True, "programs": rows}


def train_hugging_face(corpus: Path, vocab_size: int, path: Path) -> None:
    """A byte-level BPE tokenizer with the expression of Llama 3."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from megalite.text.pretokenize import KNOWN

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(list(KNOWN)[1]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    special = [
        "<|pad|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ]  # the end of a document is id 2, as in the peers' loops
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in read_documents(corpus)), trainer)
    tokenizer.save(str(path))


def write_corpus(inputs: list[str], megabytes: float, path: Path) -> None:
    paths = expand_inputs(inputs)
    with open(path, "wb") as out:
        for source in paths:
            size = 0
            for document in read_documents(source, on_bad=lambda _: None):
                if size >= megabytes * 1e6 / len(paths):
                    break
                size += out.write(json.dumps({"text": document.text}, ensure_ascii=False).encode() + b"\n")


def wall_to_help() -> float:
    """Median wall seconds until the tool has printed its help, everything it imports at start included."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--help"]
    return round(statistics.median(cpu_seconds(command)[1] for _ in range(5)), 3)


@program
def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, single = folder / "corpus.jsonl", folder / "single.jsonl"
        write_corpus(options.input, options.megabytes, corpus)
        single.write_text('{"text": "one"}\n')
        train(TrainingOptions([str(corpus)], options.vocab_size, str(folder / "t")))
        train_hugging_face(corpus, options.vocab_size, folder / "tokenizer.json")
        report = {
            "command": f"python benchmarks/data.py --input ... --megabytes {options.megabytes:g}",
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "versions": {name: version(name) for name in ("numpy", "sentencepiece", "tokenizers", "orjson")},
            "python": platform.python_version(),
            "wall_seconds_to_help": wall_to_help(),
            "sentencepiece": measure(corpus, single, "sentencepiece", folder / "t.model", folder, options.repeats),
            "huggingface": measure(corpus, single, "huggingface", folder / "tokenizer.json", folder, options.repeats),
        }
        report["peak_mb_of_largest_process"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        PEERS[sys.argv[2]](*sys.argv[3:])
    else:
        main()

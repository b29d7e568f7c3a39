"""Hugging Face tokenizers: CPU seconds of a text in this repository against the library's own calls, in one process.

Tokenizers with the expression of Llama 3 are trained on the text itself. Compared are the loop of Megatron-LM's
preprocess (`encode` of one document after another), the library's batches without offsets, and `encode_batch` here,
beginning with an empty cache. Every id must be the same. Nothing runs beside, and each program runs in turn, so the
ratio holds on a busy machine.

    python -m benchmarks.tokenize_text --input corpus/*.jsonl.gz src/**/*.py --megabytes 20
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from benchmarks.data import train_hugging_face, write_corpus
from megalite.cli import program
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.text.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.text.readers import read_documents

ROOT = Path(__file__).parent.parent
BATCH = 64  # documents of a call
Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Options:
    """Compare tokenization with the library and write a JSON file."""

    input: list[str]
    """Text, as for preprocess_data.py; --megabytes are taken from all inputs alike."""
    megabytes: float = 20.0
    """Of text."""
    vocab_sizes: tuple[int, ...] = (32_000, 128_000)
    """Of the tokenizers."""
    repeats: int = 3
    """The smallest CPU time of this many runs counts."""
    output: Path = ROOT / "benchmarks" / "results" / "tokenize_text.json"
    """Where the result goes."""


def programs(path: Path) -> dict[str, Callable[[], Encode]]:
    """For each program what makes it ready, from scratch."""
    import tokenizers

    def loop() -> Encode:
        library = tokenizers.Tokenizer.from_file(str(path))
        return lambda texts: [library.encode(text, add_special_tokens=False).ids for text in texts]

    def batches() -> Encode:
        library = tokenizers.Tokenizer.from_file(str(path))
        return lambda texts: [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]

    def here() -> Encode:
        return HuggingFaceTokenizer(path).encode_batch  # type: ignore[return-value]

    return {"loop": loop, "batches": batches, "megalite": here}


def measure(path: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    """CPU seconds per MB of each program, and how many times the loop's speed that is."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, float] = {}
    ids: dict[str, int] = {}
    for _ in range(repeats):
        for name, prepare in programs(path).items():  # in turn: the machine's other load changes with time
            encode = prepare()
            started = time.process_time()
            found = [one for at in range(0, len(texts), BATCH) for one in encode(texts[at : at + BATCH])]
            spent = time.process_time() - started
            seconds[name] = min(seconds.get(name, spent), spent)
            ids[name] = hash(tuple(tuple(map(int, one)) for one in found))
    if len(set(ids.values())) != 1:
        raise UserError(f"{path.name}: the programs disagree about the ids")
    return {
        "identical_ids": True,
        "cpu_s_per_mb": {name: round(value / megabytes, 4) for name, value in seconds.items()},
        "times_the_loop": {name: round(seconds["loop"] / value, 2) for name, value in seconds.items()},
    }


@program
def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        write_corpus(options.input, options.megabytes, corpus)
        texts = [document.text for document in read_documents(corpus)]
        report: dict[str, Any] = {
            "command": " ".join(["python", "-m", "benchmarks.tokenize_text", *sys.argv[1:]])[:400],
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "versions": {package: version(package) for package in ("tokenizers", "numpy")},
            "python": platform.python_version(),
            "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 2),
            "documents": len(texts),
        }
        for size in options.vocab_sizes:
            train_hugging_face(corpus, size, Path(name) / f"{size}.json")
            report[f"vocabulary_{size}"] = measure(Path(name) / f"{size}.json", texts, options.repeats)
    write_atomically(options.output, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that wait count as CPU seconds, too
    main()

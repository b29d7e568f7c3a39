"""The main job from raw text to a sample, each stage by the command that a user would type.

`bash launch/quickstart.sh` makes the environment and runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalite.cli import Parser, file_path, program, whole
from megalite.config.load import parse_overrides
from megalite.errors import FINISHED, STOPPED, UserError
from megalite.observe.formatting import counted
from megalite.processes import Processes, outcome
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents

ROOT = Path(__file__).resolve().parent.parent
MARKER = "quickstart.json"
"""Lies in every directory that a quickstart made, and lets the next one clear it; at the end it holds the results."""
HELD_OUT_SHARE = 40
"""One document in this many is kept from training, chosen by its text's hash."""
LONGEST_PIECE = 20_000
"""Characters; few documents are cut at line ends into pieces of about this size, so that some can be held out."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `overrides` holds the `--section.field value` for the trainer."""
    parser = Parser(
        "From raw text to a trained model, a sample and bits per byte.",
        "also: --SECTION.FIELD VALUE lays any field over the recipe's, as for the trainer",
        prog="bash launch/quickstart.sh",
        overrides=parse_overrides,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="gather",
        metavar="FILE",
        help="text to train on (default: Python's standard library)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument(
        "--processes", type=whole(1, 65535), metavar="N", help="ranks (default: one a GPU, or 4 on the CPU)"
    )
    parser.add_argument("--steps", type=whole(1, 10**9), metavar="N", help="optimizer steps")
    parser.add_argument(
        "--out", type=file_path, default=Path("runs/quickstart"), metavar="DIR", help="directory of the run"
    )
    return parser.parse_args(argv)


def clear(out: Path) -> None:
    """Make `out` empty; anything but the leavings of an earlier quickstart is refused."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"--out {out} holds files that no quickstart made; name a new directory")
    if out.exists():
        shutil.rmtree(out)
    (out / "data").mkdir(parents=True)
    (out / MARKER).write_text("{}\n")


def standard_library() -> Iterator[str]:
    """The source files of this Python's standard library, its own tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        if unwanted.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            if text.strip():
                yield text


def documents(inputs: Sequence[str] | None) -> list[str]:
    """All texts; where they are few, in pieces."""
    if inputs is None:
        texts = list(standard_library())
    else:
        bad: list[object] = []
        texts = [doc.text for path in expand_inputs(inputs) for doc in read_documents(path, on_bad=bad.append)]
        if bad:
            print(f"{counted(len(bad), 'record')} cannot be used; the first: {bad[0]}", file=sys.stderr)
    if len(texts) < 10 * HELD_OUT_SHARE:
        texts = [piece for text in texts for piece in pieces(text)]
    if len(texts) < 2:
        raise UserError(
            f"--input: {sum(map(len, texts))} characters are too little to train on; give some 100 kB or more"
        )
    return texts


def pieces(text: str) -> Iterator[str]:
    """The text cut at line ends into pieces of about LONGEST_PIECE characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + LONGEST_PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def split(texts: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl; which text goes where depends on the text alone."""

    def place(text: str) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    ranked = sorted(set(texts), key=place)  # a text that occurs twice must not be on both sides
    count = max(1, len(ranked) // HELD_OUT_SHARE)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, part in zip(paths, (ranked[count:], ranked[:count])):
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
        print(f"{path}: {counted(len(part), 'document')}, {sum(len(text.encode()) for text in part) / 1e6:.1f} MB")
    return paths


def layout(processes: int) -> list[str]:
    """All three kinds of parallelism as far as the number of ranks allows: tensor 2, then pipeline 2, the rest data."""
    tensor = 2 if processes % 2 == 0 else 1
    pipeline = 2 if processes % 4 == 0 else 1
    return ["--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline)]


def run(title: str, *command: str | Path, capture: bool = False) -> str:
    """Show and run one command; its failure, whose message it has printed itself, ends the quickstart with its code."""
    words = [str(word) for word in command]
    print(f"\n== {title}\n$ {shlex.join(words)}", flush=True)
    program = [sys.executable, *words[1:]] if words[0] == "python" else words
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    processes = Processes()
    with processes.listening():
        child = processes.start(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE if capture else None)
        said = child.stdout.read() if child.stdout else ""
        code = outcome([code for _, code in processes.wait()], processes.requests)
    if code != FINISHED or processes.requests:
        print(f"the stage “{title}” ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code or STOPPED)
    return said


def count_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@program
def main() -> None:
    started = time.monotonic()
    options = parse()
    gpus = count_gpus(options.device)
    out = options.out.absolute()
    texts = documents(options.input)
    clear(out)
    data, tokenizer = out / "data", out / "data" / "tokenizer.model"
    print("== text")
    train, held_out = split(texts, data)
    vocabulary = min(4096, max(512, sum(map(len, texts)) // 100))
    prefix = tokenizer.with_suffix("")
    sizes = ("--vocab-size", str(vocabulary), "--output-prefix", prefix)
    run("tokenizer", "python", "tools/train_tokenizer.py", "--input", train, *sizes)
    for path in (train, held_out):
        target = ("--output-prefix", path.with_suffix(""), "--tokenizer-model", tokenizer, "--append-eod")
        run(f"token file of {path.name}", "python", "tools/preprocess_data.py", "--input", path, *target)
    token_files = {name: f"{data / name}_text_document" for name in ("train", "heldout")}

    processes = options.processes or gpus or 4
    recipe = "launch/recipes/quickstart-gpu.toml" if gpus else "launch/recipes/quickstart.toml"
    command = ["bash", "launch/local.sh", recipe, "--processes", str(processes), *layout(processes)]
    command += ["--run.dir", str(out), "--run.device", "cuda" if gpus else "cpu", "--data.tokenizer", str(tokenizer)]
    command += [
        "--data.train",
        json.dumps([token_files["train"]]),
        "--data.valid",
        json.dumps([token_files["heldout"]]),
    ]
    if options.steps:
        command += ["--train.steps", str(options.steps), "--optimizer.warmup_steps", str(options.steps // 10)]
    run("training", *command, *options.overrides)
    checkpoint = ("--checkpoint", out, "--run.device", "cuda" if gpus else "cpu")
    scored = run(
        "held-out bits per byte",
        *("python", "tools/evaluate.py", "loss", *checkpoint, "--data", token_files["heldout"], "--seq-length", "256"),
        capture=True,
    )
    prompt = "def main(" if options.input is None else texts[0][:40]
    sample = run(
        "sample",
        *("python", "tools/generate.py", *checkpoint, "--prompt", prompt, "--max-new-tokens", "120"),
        *("--temperature", "0.7", "--top-p", "0.95"),
        capture=True,
    )
    results = json.loads(scored.splitlines()[-1]) | {"sample": sample, "seconds": round(time.monotonic() - started)}
    (out / MARKER).write_text(json.dumps(results, indent=1) + "\n")
    print(sample)
    print(f"== done in {results['seconds']} s: {results['bits_per_byte']:.3f} bits per byte on the held-out files")
    for name in ("loss.png", "metrics.jsonl", "config.toml", "checkpoints", "log"):
        print(f"   {out / name}")


if __name__ == "__main__":
    main()

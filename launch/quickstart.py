"""The main job from raw text to a sample, each stage by the command that a user would type.

`bash launch/quickstart.sh` makes the environment and runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import quickstart_chat
from launch.stages import Ranks, layout, run
from megalite.cli import Parser, file_path, program, whole
from megalite.config.load import parse_overrides
from megalite.errors import UserError
from megalite.observe.formatting import counted
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents

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
    parser.add_argument(
        "--steps", type=whole(1, 10**9), metavar="N", help="optimizer steps (with --chat: of each stage)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="then fine-tune it on conversations, improve its answers and talk to it"
    )
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


def count_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def results_of(out: Path, device: str, held_out: str, prompt: str) -> dict[str, Any]:
    """Bits per byte of the held-out files, and a sample."""
    checkpoint = ("--checkpoint", out, "--run.device", device)
    scored = run(
        "held-out bits per byte",
        *("python", "tools/evaluate.py", "loss", *checkpoint, "--data", held_out, "--seq-length", "256"),
        capture=True,
    )
    sample = run(
        "sample",
        *("python", "tools/generate.py", *checkpoint, "--prompt", prompt, "--max-new-tokens", "120"),
        *("--temperature", "0.7", "--top-p", "0.95"),
        capture=True,
    )
    print(sample)
    return json.loads(scored.splitlines()[-1]) | {"sample": sample}


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
    read = [train, quickstart_chat.write_data(data)] if options.chat else [train]
    sizes = ("--vocab-size", str(vocabulary), "--output-prefix", tokenizer.with_suffix(""))
    run("tokenizer", "python", "tools/train_tokenizer.py", "--input", *read, *sizes)
    for path in (*read, held_out):
        target = ("--output-prefix", path.with_suffix(""), "--tokenizer-model", tokenizer, "--append-eod")
        run(f"token file of {path.name}", "python", "tools/preprocess_data.py", "--input", path, *target)
    token_files = {path.stem: f"{path.with_suffix('')}_text_document" for path in (*read, held_out)}

    ranks = Ranks(options.processes or gpus or 4, "cuda" if gpus else "cpu")
    command = ranks.training("quickstart-gpu" if gpus else "quickstart", out, tokenizer, *layout(ranks.processes))
    command += ["--data.train", json.dumps([[1, token_files[path.stem]] for path in read])]
    command += ["--data.valid", json.dumps([token_files["heldout"]])]
    if options.steps:
        command += ["--train.steps", str(options.steps), "--optimizer.warmup_steps", str(options.steps // 10)]
    run("training", *command, *options.overrides)
    prompt = "def main(" if options.input is None else texts[0][:40]
    results = results_of(out, ranks.device, token_files["heldout"], prompt)
    if options.chat:
        results |= quickstart_chat.chat(out, ranks, tokenizer, options.steps)
    results["seconds"] = round(time.monotonic() - started)
    (out / MARKER).write_text(json.dumps(results, indent=1) + "\n")
    print(f"== done in {results['seconds']} s: {results['bits_per_byte']:.3f} bits per byte on the held-out files")
    for name in ("loss.png", "metrics.jsonl", "config.toml", "checkpoints", "log", *(("sft", "grpo") * options.chat)):
        print(f"   {out / name}")
    if options.chat:
        print(quickstart_chat.farewell(out))


if __name__ == "__main__":
    main()

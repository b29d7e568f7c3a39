"""Checkpoints that can read and write, and small data in the public forms of the three tasks, all of our own making."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import tokenizers

from tests.fixtures import golden

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!-+*/=()[]'\"#$_\n"
BOS, EOS = 1, 2


def make_checkpoint(folder: Path, name: str = "llama3_gqa", positions: int = 2048) -> Path:
    """A fixture's weights with a tokenizer of single characters that puts <s> before every text, and more positions."""
    folder.mkdir()
    source = golden.folder(name)
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def words(random: Any, least: int, most: int) -> str:
    """Some words, random anew."""
    lengths = random.integers(1, 8, size=random.integers(least, most + 1))
    return " ".join("".join(LETTERS[place] for place in random.integers(0, 52, size=length)) for length in lengths)


def mmlu_rows(random: Any, subjects: int, rows: int) -> list[dict[str, Any]]:
    """Questions with leading spaces, equal choices and choices of any length among them."""
    found = []
    for subject in range(subjects):
        for _ in range(rows):
            choices = [words(random, 1, 4) for _ in range(4)]
            choices[3] = choices[0] if random.integers(4) == 0 else choices[3]
            question = " " * random.integers(3) + words(random, 3, 12) + "?"
            answer = int(random.integers(4))
            found.append({"subject": f"field_of_{subject}", "question": question, "choices": choices, "answer": answer})
    return found


def gsm8k_rows(random: Any, rows: int) -> list[dict[str, str]]:
    return [
        {"question": f"{words(random, 3, 9)}?", "answer": f"{words(random, 2, 6)}.\n#### {random.integers(-9, 2000):,}"}
        for _ in range(rows)
    ]


def humaneval_rows(count: int = 4) -> list[dict[str, str]]:
    """Functions that add a number."""
    return [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def add_{number}(x):\n    """ Add {number} to x\n    """\n',
            "entry_point": f"add_{number}",
            "canonical_solution": f"    return x + {number}\n",
            "test": f"\n\ndef check(candidate):\n    assert candidate(5) == {5 + number}\n\n",
        }
        for number in range(count)
    ]


def write_csv(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """MMLU's first form: a file without a head for each subject and split."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for subject in {row["subject"] for row in rows}:
        with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            for row in rows:
                if row["subject"] == subject:
                    writer.writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_data(folder: Path, random: Any, *, subjects: int = 3, rows: int = 6) -> Path:
    """All three tasks in the forms of their first repositories."""
    write_csv(folder / "mmlu", "dev", mmlu_rows(random, subjects, 5))
    write_csv(folder / "mmlu", "test", mmlu_rows(random, subjects, rows))
    write_jsonl(folder / "gsm8k" / "train.jsonl", gsm8k_rows(random, 9))
    write_jsonl(folder / "gsm8k" / "test.jsonl", gsm8k_rows(random, rows))
    write_jsonl(folder / "humaneval" / "HumanEval.jsonl.gz", humaneval_rows())
    return folder

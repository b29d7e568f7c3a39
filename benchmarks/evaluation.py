"""Evaluation against lm-evaluation-harness's own Hugging Face model: the same requests, in the same run.

python benchmarks/evaluation.py                       # needs the extra `eval`, transformers and accelerate
python benchmarks/evaluation.py --questions 96 --repeats 5

A model of 10 million parameters with random weights answers MMLU-like questions (four letters after five examples that
a subject's questions share) and continues prompts. One thread; the two take turns, and what counts are CPU seconds of
the process, of which the least of the repeats is taken: this machine need not be idle. With data parallelism 2 the
slower rank's CPU seconds are compared with half of what one process needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tokenizers
import torch

from megalite.evaluation.service import Service, serving
from megalite.evaluation.text_model import TextModel
from megalite.generation.loading import load_model, open_checkpoint

VOCABULARY, LAYERS, WIDTH, POSITIONS = 8192, 8, 256, 2048
NEW_TOKENS = 32


def make_checkpoint(folder: Path) -> None:
    """Random weights in Hugging Face's form, with a tokenizer of whole words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>", "unk_token": "<unk>"}))


def text(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(f"w{number}" for number in random.integers(3, VOCABULARY, size=random.integers(least, most)))


def choices(questions: int) -> list[tuple[str, str]]:
    """Eight questions of a subject have the same five examples in front, of 60 to 130 tokens each, as MMLU's."""
    random, pairs = np.random.default_rng(1), []
    for number in range(questions):
        if number % 8 == 0:
            shared = text(random, 300, 650)
        prompt = f"{shared} {text(random, 60, 130)}"
        pairs += [(prompt, f" w{letter}") for letter in (10, 11, 12, 13)]
    return pairs


def prompts(count: int) -> list[str]:
    random = np.random.default_rng(2)
    return [text(random, 40, 200) for _ in range(count)]


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def with_service(folder: Path, call: Callable[[TextModel], Any]) -> Any:
    """The result of `call` on rank 0; None on others."""
    with (
        open_checkpoint(folder) as opened,
        load_model(opened, (), data_parallel=True) as loaded,
        serving(loaded.model, opened.tokenizer) as service,
    ):
        return None if service is None else call(TextModel.of(service, opened))


def compare(model: TextModel, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Least CPU seconds of both, and whether they agree."""
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(str(folder), dtype="float32", device="cpu", batch_size=options.batch_size)
    pairs, beginnings = choices(options.questions), prompts(options.prompts)
    settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    asked = [SimpleNamespace(args=pair) for pair in pairs]
    written = [SimpleNamespace(args=(beginning, settings)) for beginning in beginnings]
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "choices": (lambda: model.loglikelihoods(pairs), lambda: peer.loglikelihood(asked, disable_tqdm=True)),
        "completions": (
            lambda: model.generate(beginnings, NEW_TOKENS),
            lambda: peer.generate_until(written, disable_tqdm=True),
        ),
    }
    report = {}
    for name, (ours, theirs) in calls.items():
        rounds = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(options.repeats)]
        own, other = min(one[0] for one, _ in rounds), min(one[0] for _, one in rounds)
        (_, mine), (_, its) = rounds[0]
        if name == "choices":
            agree = max(abs(one[0] - two[0]) for one, two in zip(mine, its)) < 1e-3
        else:
            agree = mine == its
        report[name] = {"ours": own, "theirs": other, "ratio": other / own, "agree": agree}
    return report


def worker(folder: Path, questions: int, repeats: int) -> None:
    """A rank of data parallelism: its least CPU seconds in the service, written beside the checkpoint."""
    seconds: list[float] = []
    score = Service._score

    def timed(self: Service, *arguments: Any) -> Any:
        taken, result = cpu_seconds(lambda: score(self, *arguments))
        seconds.append(taken)
        return result

    Service._score = timed  # type: ignore[assignment,method-assign]
    pairs = choices(questions)

    def call(model: TextModel) -> None:
        for _ in range(repeats):
            model.loglikelihoods(pairs)

    with_service(folder, call)
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    per_call = len(seconds) // repeats
    least = min(sum(seconds[first : first + per_call]) for first in range(0, len(seconds), per_call))
    (folder / f"seconds_{size}_{rank}").write_text(str(least))


def data_parallel(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    words = ["benchmarks/evaluation.py", "--worker", str(folder), "--questions", str(options.questions)]
    words += ["--repeats", str(options.repeats)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    for command in (
        [sys.executable, *words],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words],
    ):
        subprocess.run(command, check=True, cwd=root, env=environment, stdout=subprocess.DEVNULL)
    alone = float((folder / "seconds_1_0").read_text())
    slower = max(float((folder / f"seconds_2_{rank}").read_text()) for rank in range(2))
    return {"alone": alone, "slower_of_two": slower, "of_ideal": slower / (alone / 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="of the peer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        worker(options.worker, options.questions, options.repeats)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        report = with_service(folder, lambda model: compare(model, folder, options))
        report["data_parallel_2"] = data_parallel(folder, options)
    report["machine"] = {"cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

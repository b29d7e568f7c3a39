"""Generation with this repository against transformers' `generate`: CPU seconds of one thread, on the same weights.

A Llama of 10 million parameters with random weights is saved by transformers and read by both. The programs take turns
in one process, so that the ratio holds on a busy machine; the greedy tokens must be the same. A row more is ragged:
prompts of many lengths, padded on the left. The last rows time drawing one token of 64 rows alone, at the vocabulary of
Llama 3.

    python -m benchmarks.generation
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

from megalite.cli import program
from megalite.files import write_atomically
from megalite.generation.generator import Generator, Limits
from megalite.generation.loading import load_model, open_checkpoint
from megalite.generation.sampling import Sampling, sample

ROOT = Path(__file__).parent.parent
VOCABULARY, LLAMA_3 = 8192, 128_256
Run = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Options:
    """Compare generation with transformers and write a JSON file."""

    batches: tuple[int, ...] = (1, 8, 64)
    """Prompts generated together."""
    prompt: int = 32
    """Tokens of a prompt."""
    new: int = 32
    """Tokens added to it."""
    repeats: int = 9
    """Turns; the median of their ratios counts."""
    output: Path = ROOT / "benchmarks" / "results" / "generation.json"
    """Where the result goes."""


@contextmanager
def both_models() -> Iterator[tuple[Generator, Any]]:
    """Ours and transformers', on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=0.1,
            eos_token_id=None,
        )
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with open_checkpoint(folder) as opened, load_model(opened, ()) as loaded, loaded.model.generating() as stages:
            yield Generator(stages, loaded.model.owners, loaded.mesh, loaded.config.model), theirs


def runs(generator: Generator, theirs: Any, prompts: list[list[int]], temperature: float, new: int) -> dict[str, Run]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def transformers() -> list[list[int]]:
        out = theirs.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            eos_token_id=None,
            **how,
        )
        return out[:, longest:].tolist()  # type: ignore[no-any-return]

    def megalite() -> list[list[int]]:
        return [row.new_ids for row in generator.run(prompts, Sampling(temperature), Limits(new))]

    return {"megalite": megalite, "transformers": transformers}


def compare(programs: dict[str, Run], repeats: int, same: bool) -> dict[str, float]:
    """Median CPU seconds of each, and the median of the ratios of the turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        results = []
        for name, run in programs.items():
            start = time.process_time()
            results.append(run())
            if turn > 0:
                seconds[name].append(time.process_time() - start)
        if same and results[0] != results[1]:
            raise AssertionError("the greedy tokens differ")
    ratios = [theirs / ours for ours, theirs in zip(seconds["megalite"], seconds["transformers"])]
    return {name: statistics.median(values) for name, values in seconds.items()} | {"ratio": statistics.median(ratios)}


def drawing(repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of CPU to draw one token of 64 rows, log-probability included."""
    logits_BV = torch.randn(64, LLAMA_3) * 3
    numbers_B = torch.rand(64, dtype=torch.float64)
    for name, sampling in (
        ("greedy", Sampling(0)),
        ("temperature 1", Sampling(1.0)),
        ("temperature 0.7", Sampling(0.7)),
        ("top-k 50", Sampling(0.7, top_k=50)),
        ("top-p 0.9", Sampling(0.7, top_p=0.9)),
    ):
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            sample(logits_BV, sampling, numbers_B)
            times.append(1000 * (time.process_time() - start))
        yield {"sampling": name, "milliseconds": round(statistics.median(times[1:]), 1)}


@program
def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    rows = []
    with both_models() as (generator, theirs), torch.no_grad():
        for batch in options.batches:
            prompts = torch.randint(3, VOCABULARY, (batch, options.prompt)).tolist()
            ragged = [row[: options.prompt - number % 16] for number, row in enumerate(prompts)]
            cases = [("greedy", prompts, 0.0), ("sampled", prompts, 1.0), ("greedy, ragged", ragged, 0.0)]
            for name, texts, temperature in cases[: 3 if batch > 1 else 2]:
                result = compare(
                    runs(generator, theirs, texts, temperature, options.new), options.repeats, temperature == 0
                )
                speed = round(batch * options.new / result["megalite"])
                rows.append({"batch": batch, "case": name, "tokens_per_cpu_second": speed, "ratio": result["ratio"]})
                print(f"batch {batch}, {name}: {speed} tokens/CPU-s, {result['ratio']:.2f} x transformers", flush=True)
    draws = list(drawing(options.repeats))
    for draw in draws:
        print(f"drawing, {draw['sampling']}: {draw['milliseconds']} ms of CPU")
    report = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "command": "python -m benchmarks.generation",
        "generation": rows,
        "drawing": {"rows": 64, "vocabulary": LLAMA_3, "cases": draws},
    }
    write_atomically(options.output, (json.dumps(report, indent=1) + "\n").encode())
    print(options.output)


if __name__ == "__main__":
    main()

"""The shipped recipes and the search agree: no layout is much faster, or the recipe says which and why."""

import re
from pathlib import Path

import pytest

from megalite.config import load_config
from megalite.config.check import check_combinations
from megalite.errors import UserError
from megalite.planning import DEVICES, Device, Job
from megalite.planning.memory import worst_rank
from megalite.planning.search import candidates
from megalite.planning.step_time import least_step_seconds, step_time

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"

DEVICES_OF = {  # recipe: numbers of devices
    "quickstart": (1, 4),
    "quickstart-gpu": (1, 8),
    "quickstart-sft": (1, 2),
    "quickstart-grpo": (1, 2),
    "124m": (1, 8),
    "1b": (1, 8, 64),
    "llama3-8b-8gpu": (8,),
    "llama3-8b-64gpu": (64,),
    "llama3-8b-128k-64gpu": (64,),
    "llama3-8b-lora-sft-1gpu": (1,),
    "llama3-8b-sft-8gpu": (8,),
    "llama3-8b-reward-8gpu": (8,),
    "llama3-8b-dpo-8gpu": (8,),
    "llama3-8b-dpo-64gpu": (64,),
    "llama3-8b-grpo-8gpu": (8,),
    "llama3-8b-grpo-64gpu": (64,),
    "llama3-8b-ppo-64gpu": (64,),
    "mixtral-8x7b-16gpu": (16,),
    "deepseek-v2-lite-16gpu": (16,),
    "qwen3-30b-a3b-32gpu": (32,),
    "llama3-70b-256gpu": (256,),
    "llama3-405b-8192gpu": (8192,),
}


def test_every_recipe_is_listed_here():
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(DEVICES_OF)


def gain(config, devices: int, device: Device) -> float:
    """What the fastest layout that fits is faster than the recipe's: the answer of `search`, without its ranking."""
    own = Job.of(config, devices, device)
    least = seconds = step_time(own).seconds
    assert not device.is_gpu or worst_rank(own).total < 0.93 * device.memory
    jobs = []
    for candidate in candidates(config, devices, device):
        try:
            check_combinations(candidate, devices)
        except UserError:
            continue
        job = Job.of(candidate, devices, device)
        jobs.append((least_step_seconds(job), len(jobs), job))
    for bound, _, job in sorted(jobs):
        if bound >= least:
            break
        if worst_rank(job).total <= (device.memory or float("inf")):
            least = min(least, step_time(job).seconds)
    return seconds / least


LONG = (
    "llama3-8b-128k-64gpu",
    "llama3-8b-dpo-64gpu",
    "llama3-8b-grpo-64gpu",
    "llama3-8b-ppo-64gpu",
    "mixtral-8x7b-16gpu",
    "deepseek-v2-lite-16gpu",
    "qwen3-30b-a3b-32gpu",
    "llama3-70b-256gpu",
    "llama3-405b-8192gpu",
)
ON_CPUS = ("quickstart", "quickstart-sft", "quickstart-grpo")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in DEVICES_OF]
)
def test_no_layout_is_much_faster_or_the_recipe_says_which(name):
    config = load_config(RECIPES / f"{name}.toml")
    if config.model.vocab_size == 0:  # the tokenizer's
        config = load_config(RECIPES / f"{name}.toml", ["--model.vocab_size", "50304" if name == "124m" else "4096"])
    device = DEVICES["cpu" if name in ON_CPUS else "h100"]
    told = re.search(r"(\d+) % faster", (RECIPES / f"{name}.toml").read_text())
    found = max(gain(config, devices, device) for devices in DEVICES_OF[name])
    assert found < 1.03 if told is None else found == pytest.approx(1 + int(told[1]) / 100, abs=0.01)

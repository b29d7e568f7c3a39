"""Every recipe that ships is complete: it reads, its layout works on the machines it names, its size is the model's."""

import re
from pathlib import Path

import pytest

from launch.recipes.rewards import last_number
from megalite.align.rewards import call_reward
from megalite.config import load_config
from megalite.config.check import check_layout
from megalite.model.cost import parameter_count
from megalite.model.partition import layers_of_stage
from megalite.planning import DEVICES, estimate

pytestmark = pytest.mark.fast

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"

PLANS = {  # recipe: world sizes, vocabulary where the recipe leaves it to the tokenizer, parameters in millions
    "quickstart": ((1, 4), 4096, 5.05),
    "quickstart-gpu": ((1, 8), 4096, 81.8),
    "quickstart-sft": ((1, 2), 4096, 5.05),
    "quickstart-grpo": ((1, 2), 4096, 5.05),
    "124m": ((1, 8), 50304, 123.6),
    "1b": ((1, 8, 64), None, 1235.8),
    "llama3-8b-8gpu": ((8,), None, 8030.3),
    "llama3-8b-64gpu": ((64,), None, 8030.3),
    "llama3-8b-128k-64gpu": ((64,), None, 8030.3),
    "llama3-8b-lora-sft-1gpu": ((1,), None, 8030.3),
    "llama3-8b-sft-8gpu": ((8,), None, 8030.3),
    "llama3-8b-reward-8gpu": ((8,), None, 8030.3),
    "llama3-8b-dpo-8gpu": ((8,), None, 8030.3),
    "llama3-8b-dpo-64gpu": ((64,), None, 8030.3),
    "llama3-8b-grpo-8gpu": ((8,), None, 8030.3),
    "llama3-8b-grpo-64gpu": ((64,), None, 8030.3),
    "llama3-8b-ppo-64gpu": ((64,), None, 8030.3),
    "llama3-70b-256gpu": ((256,), None, 70553.7),
    "llama3-405b-8192gpu": ((8192,), None, 405853.4),
    "mixtral-8x7b-16gpu": ((16,), None, 46702.8),
    "deepseek-v2-lite-16gpu": ((16,), None, 15706.5),
    "qwen3-30b-a3b-32gpu": ((32,), None, 30532.1),
}


def test_every_recipe_is_listed_here():
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_recipe(name):
    world_sizes, vocabulary, millions = PLANS[name]
    overrides = ["--model.vocab_size", str(vocabulary)] if vocabulary else []
    config = load_config(RECIPES / f"{name}.toml", overrides)
    for world_size in world_sizes:
        check_layout(config, world_size)
    assert parameter_count(config.model) / 1e6 == pytest.approx(millions, rel=1e-3)
    stages = [layers_of_stage(config.model, config.stages, stage) for stage in range(config.stages)]
    assert [layer for stage in stages for layer in stage] == list(range(config.model.layers)) and all(stages)


@pytest.mark.parametrize("name", [name for name in PLANS if "planner's word" in (RECIPES / f"{name}.toml").read_text()])
def test_the_planners_word_in_a_recipe_is_what_it_says(name):
    text = (RECIPES / f"{name}.toml").read_text()
    memory, seconds = re.search(r"planner's word for H100: (\d+) GiB, ([\d.]+) s a step", text).groups()
    plan = estimate(load_config(RECIPES / f"{name}.toml"), PLANS[name][0][0], DEVICES["h100"])
    assert round(plan.memory.total / 2**30) == int(memory)
    assert plan.time.seconds == pytest.approx(float(seconds), abs=0.5 if float(seconds) > 5 else 0.05)


def test_the_recipes_reward_reads_the_last_number():
    texts = ["so 3 + 4 = 7.", "1,200 apples", "no idea", "it is 5, not 6", "-2.5"]
    answers = [7, "1200", 0, 5, "so -2.5"]
    scores = call_reward(
        "rewards:last_number", last_number, [""] * 5, texts, [[]] * 5, {"answer": answers, "more": answers}
    )
    assert scores == [1, 1, 0, 0, 1]


def test_stages_are_as_the_70b_recipe_tells_them():
    config = load_config(RECIPES / "llama3-70b-256gpu.toml")
    layers = [len(layers_of_stage(config.model, config.stages, stage)) for stage in range(config.stages)]
    assert layers == [5, *[4] * 18, 3]


def test_the_quickstart_lays_out_any_number_of_processes():
    from launch.stages import layout

    for processes in (1, 2, 3, 4, 6, 8, 16):
        steps = [] if 16 % processes in (0, 1) else ["--train.global_batch_size", str(48 * 4)]
        config = load_config(RECIPES / "quickstart.toml", [*layout(processes), "--model.vocab_size", "4096", *steps])
        assert processes % config.model_parallel == 0
        if processes == 4:
            assert (config.parallel.tensor, config.parallel.pipeline) == (2, 2)

"""Learning-rate schedules against tables worked out by hand."""

import dataclasses
import math

import pytest

from megalite.config import Config, OptimizerConfig, TrainConfig
from megalite.optim.lr_schedule import learning_rate

pytestmark = pytest.mark.fast

TABLES = {
    # 10 steps, of which 2 warm up; lr 1, min_lr 0.2; step -> rate
    "constant": {1: 0.5, 2: 1.0, 3: 1.0, 6: 1.0, 10: 1.0, 12: 1.0},
    "linear": {1: 0.5, 2: 1.0, 3: 0.9, 6: 0.6, 10: 0.2, 12: 0.2},
    "cosine": {1: 0.5, 2: 1.0, 4: 0.6 + 0.4 * math.sqrt(0.5), 6: 0.6, 8: 0.6 - 0.4 * math.sqrt(0.5), 10: 0.2, 12: 0.2},
    "wsd": {1: 0.5, 2: 1.0, 3: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2, 12: 0.2},
}


def config(schedule, steps=10, **options):
    optimizer = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.2, "warmup_steps": 2, "schedule": schedule} | options)
    return Config(train=TrainConfig(steps=steps), optimizer=optimizer)


@pytest.mark.parametrize("schedule", TABLES)
def test_table(schedule):
    plan = config(schedule, decay_steps=4)
    for step, rate in TABLES[schedule].items():
        assert learning_rate(step, plan) == pytest.approx(rate, abs=1e-12), step


@pytest.mark.parametrize("schedule", TABLES)
def test_without_warm_up_the_first_step_is_not_zero_and_the_plan_ends_at_the_least_rate(schedule):
    plan = config(schedule, steps=37, warmup_steps=0)
    rates = [learning_rate(step, plan) for step in range(1, 38)]
    assert rates[0] > 0.9
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_wsd_decays_over_a_fifth_of_the_plan_when_nothing_is_said():
    plan = config("wsd", steps=100)
    assert learning_rate(80, plan) == 1.0
    assert learning_rate(81, plan) < 1.0
    assert learning_rate(90, plan) == pytest.approx(0.6)


def test_least_rate_is_a_tenth_by_default():
    plan = dataclasses.replace(config("cosine"), optimizer=OptimizerConfig(lr=2.0, warmup_steps=0))
    assert learning_rate(10, plan) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", TABLES)
def test_a_plan_that_is_all_warm_up(schedule):
    plan = config(schedule, warmup_steps=10, decay_steps=1)
    assert [learning_rate(step, plan) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])

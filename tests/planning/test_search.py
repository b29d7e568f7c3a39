"""The search finds what trying everything finds, keeps to the trainer's rules and to the device's memory."""

import dataclasses

import pytest

from megalite.config import build_config
from megalite.config.check import check_layout
from megalite.errors import UserError
from megalite.planning import DEVICES, Job, estimate
from megalite.planning.hardware import GIB
from megalite.planning.memory import worst_rank
from megalite.planning.search import candidates, search
from megalite.planning.step_time import least_step_seconds, step_time

pytestmark = pytest.mark.fast


def some_config(**fields):
    model = {
        "layers": 6,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "heads": 16,
        "kv_heads": 4,
        "vocab_size": 32000,
    }
    train = {"seq_length": 2048, "micro_batch_size": 1, "global_batch_size": 24, "steps": 100} | fields
    return build_config({"model": model, "train": train})


def everything(config, devices, device):
    """(seconds, memory) of every layout that the trainer accepts, each timed."""
    found = []
    for candidate in candidates(config, devices, device):
        try:
            check_layout(candidate, devices)
        except UserError:
            continue
        job = Job.of(candidate, devices, device)
        found.append((step_time(job).seconds, worst_rank(job).total, job))
    return found


def test_the_fastest_that_fit_and_no_others():
    config, devices = some_config(), 4
    found = everything(config, devices, DEVICES["h100"])
    limit = sorted(total for _, total, _ in found)[len(found) // 3]
    device = dataclasses.replace(DEVICES["h100"], memory=limit)
    ranking = search(config, devices, device, count=7)
    fitting = sorted(seconds for seconds, total, _ in found if total <= limit)
    assert [plan.time.seconds for plan in ranking.plans] == pytest.approx(fitting[:7])
    assert all(plan.memory.total <= limit for plan in ranking.plans)
    assert ranking.fitting == len(fitting) and ranking.too_large == len(found) - len(fitting)


def test_the_bound_is_below_the_simulation():
    for seconds, _, job in everything(some_config(), 4, DEVICES["a100"]):
        assert least_step_seconds(job) <= seconds * (1 + 1e-9)


def test_every_layout_found_is_one_the_trainer_takes():
    ranking = search(some_config(), 6, DEVICES["h200"], count=50)
    for plan in ranking.plans:
        job = plan.job
        assert job.world == 6 and job.tokens_per_step == 24 * 2048
        recipe = some_config(micro_batch_size=job.micro_batch_size, recompute=job.recompute)
        layout = {name: getattr(job, name) for name in ("tensor", "pipeline", "zero", "schedule", "virtual_stages")}
        config = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, sequence=None, **layout))
        again = estimate(config, 6, DEVICES["h200"])
        assert again.memory.total == plan.memory.total and again.time.seconds == plan.time.seconds


def test_nothing_fits():
    device = dataclasses.replace(DEVICES["h100"], memory=1 * GIB)
    with pytest.raises(UserError, match=r"no layout fits: the smallest needs \d+\.\d GiB on a device with 1\.0"):
        search(some_config(), 2, device)


def test_a_mistake_outside_the_layout_is_named():
    with pytest.raises(UserError, match=r"model\.kv_heads"):
        config = some_config()
        search(dataclasses.replace(config, model=dataclasses.replace(config.model, kv_heads=3)), 2, DEVICES["h100"])

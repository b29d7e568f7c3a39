"""Effective training time over restarts, kills and rollbacks, from hand-made files and from a run that is killed."""

import json
import random

import pytest

from megalite.observe.events import EventLog, process_start, read_events
from megalite.observe.goodput import PARTS, account, describe_goodput


def row(step, time, seconds, **more):
    plain = {"loss": 2.0, "save_stall_seconds": 0.0, "validation_seconds": 0.0}
    return {"step": step, "time": time, "step_seconds": seconds} | plain | more


def event(kind, time, **facts):
    return {"event": kind, "time": time, **facts}


@pytest.mark.fast
def test_a_day_with_everything_in_it():
    """Start-up 10, steps of 20 with a save of 5 and a validation of 3; killed; down until 200; start-up 12; two steps
    of the first start are lost; a rollback; a refused step; a clean end."""
    events = [
        event("start", 0.0),
        event("ready", 10.0, step=0),
        event("start", 200.0),
        event("lost", 205.0, to_step=2, steps=2, seconds=40.0, until=98.0),
        event("ready", 212.0, step=2),
        event("rollback", 300.0, seconds=9.0, step=5, to_step=4),
        event("lost", 300.0, to_step=4, steps=1, seconds=21.0, until=290.0),
        event("stop", 400.0, code=0),
    ]
    metrics = [
        row(1, 30.0, 20.0),
        row(2, 58.0, 20.0, save_stall_seconds=5.0, validation_seconds=3.0),
        row(3, 240.0, 22.0),
        row(4, 265.0, 22.0),
        row(5, 330.0, 25.0, loss=None),
        row(6, 360.0, 25.0),
    ]
    goodput = account(events, metrics)
    assert goodput.wall == 400.0 and goodput.starts == 2
    assert goodput.seconds == {
        "training": 20 + 20 + 22 + 22 + 25,
        "start-up": 10 + 12,
        "checkpoints": 5,
        "validation": 3,
        "lost": 40 + 9 + 21 + 25,
        "down": 200 - 98,
        "other": pytest.approx(98 - 10 - 40 - 8 - 40 + 200 - 12 - 22 - 22 - 25 - 25 - 30),
    }
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall)
    assert "27.3% of 0:06:40" in describe_goodput(goodput) and "started twice" in describe_goodput(goodput)


@pytest.mark.fast
def test_parts_always_make_up_the_whole():
    """Random sessions, each ended by a stop or a kill."""
    chance = random.Random()
    for _ in range(200):
        events, metrics, clock, step = [], [], 1e9, 0
        for _ in range(chance.randint(1, 5)):
            events.append(event("start", clock))
            clock += chance.uniform(0, 50)
            if chance.random() < 0.8:
                events.append(event("ready", clock, step=step))
                for _ in range(chance.randint(0, 5)):
                    step, seconds, stall = step + 1, chance.uniform(1, 9), chance.choice([0.0, 2.0])
                    clock += seconds + stall + chance.uniform(0, 1)
                    metrics.append(row(step, clock, seconds, save_stall_seconds=stall))
            if chance.random() < 0.5:
                clock += chance.uniform(0, 5)
                events.append(event("stop", clock, code=0))
            clock += chance.uniform(0, 100)
        goodput = account(events, metrics)
        assert tuple(goodput.seconds) == PARTS and min(goodput.seconds.values()) >= 0
        assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall, abs=1e-3)


@pytest.mark.fast
def test_a_run_that_goes_on_counts_up_to_now():
    assert account([], []) is None
    assert account([event("start", 5.0)], [], now=15.0).seconds["start-up"] == 10.0
    running = account([event("start", 5.0), event("ready", 6.0)], [row(1, 10.0, 3.0)], now=25.0)
    assert running.wall == 20.0 and running.share == 3 / 20


@pytest.mark.fast
def test_events_are_rank_0s_and_survive_what_cuts_them_short(tmp_path):
    for rank in (0, 1):
        log = EventLog(tmp_path, rank)
        log.write_start(2)
        log.write("ready", step=rank)
        log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    log = EventLog(tmp_path, 0)
    log.write("stop", code=0, at=1e12)
    found = read_events(tmp_path)
    assert [each["event"] for each in found] == ["start", "ready", "stop"]
    assert found[0]["time"] == pytest.approx(process_start(), abs=0.1) and found[0]["ranks"] == 2
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["time"] == 1e12

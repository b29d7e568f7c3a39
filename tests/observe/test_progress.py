"""The progress line: what a narrow terminal keeps, time left after a rollback, and the line's place below messages."""

import contextlib
import logging
import os
import pty
import re
import sys
from datetime import timedelta

import pytest

from megalite.observe import progress
from megalite.observe.metrics import StepMetrics
from megalite.observe.progress import ProgressDisplay, describe, fit

pytestmark = pytest.mark.fast


def metrics(step, **more):
    numbers = {"loss": 2.3456, "grad_norm": 1.234, "lr": 3e-4, "tokens": 64 * step, "step_seconds": 0.1}
    numbers |= {"tokens_per_second": 1234567.0, "tflops_per_device": 412.5, "mfu": 0.417, "memory_gib": 1.0}
    rest = {"validation_loss": None, "save_stall_seconds": 0.0, "skipped_samples": 0, "rollbacks": 0}
    return StepMetrics(step=step, **numbers | rest | more)


@contextlib.contextmanager
def terminal(monkeypatch):
    """A pseudo-terminal as standard error; gives a function that tells what was written to it."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    stream = os.fdopen(slave, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")

    def written():
        content = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                content += os.read(master, 1 << 16)
        return content.decode()

    yield written
    stream.close()
    os.close(master)


@pytest.mark.parametrize(("columns", "absent"), [(80, ["TFLOP/s", "MFU", "lr "]), (120, ["TFLOP/s"])])
def test_step_and_time_left_are_seen_at_any_width(monkeypatch, columns, absent):
    monkeypatch.setenv("COLUMNS", str(columns))
    with terminal(monkeypatch) as written:
        display = ProgressDisplay(250_000, 10)
        display._moments[0] -= 3.0
        display.show(metrics(12_345, validation_loss=2.5))
        display.close()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert lines[-1].startswith("step 12345/250000  left ") and "loss 2.3456" in lines[-1]
    assert len(lines[-1]) < columns and not any(word in lines[-1] for word in absent)


def test_what_matters_least_goes_first():
    parts = ["step 1/2", "left 0:00:01", *describe(metrics(1))]
    kept = [fit(parts, width) for width in range(5, 120)]
    assert all(len(line) <= width for width, line in enumerate(kept, start=5))
    assert kept[0] == "step " and kept[-1].endswith("MFU 41.7%")
    assert [line.count("  ") for line in kept] == sorted(line.count("  ") for line in kept)
    assert "no loss" in describe(metrics(1, loss=float("nan")))


def test_messages_stand_above_the_line_which_is_drawn_again(monkeypatch):
    log = logging.getLogger("megalite")
    with terminal(monkeypatch) as written:
        handler = logging.StreamHandler(sys.stderr)
        monkeypatch.setattr(log, "handlers", [handler])
        monkeypatch.setattr(log, "propagate", False)
        display = ProgressDisplay(100, 10)
        display.show(metrics(7))
        log.warning("a message in between")
        seen = written()
        assert seen.index("a message in between") < seen.rindex("/100")
        display.close()
        assert handler.stream is sys.stderr and not hasattr(sys.stderr, "rich_proxied_file")


@pytest.mark.parametrize("steps", [[101, 102], [50, 51, 49], [100], [1] * 500])
def test_time_left_whatever_step_the_run_has_gone_back_to(capsys, monkeypatch, steps):
    """A restart at step 100 that rolls back to before it: no division by nothing, no time left below 0."""
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 2.0 * next(clock))
    display = ProgressDisplay(200, 1)
    for step in steps:
        display.show(metrics(step))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"step {steps[-1]}/200  left {timedelta(seconds=2 * (200 - steps[-1]))}  loss")

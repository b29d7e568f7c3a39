"""tools/report.py on runs of every kind: whole, interrupted, empty, with losses that are not finite, several."""

import base64
import json
import random
import re
import sys
from importlib import resources

import numpy as np
import pytest

from megalite.errors import UserError
from megalite.observe.picture import smooth
from megalite.observe.timeline import PHASES
from megalite.report import style
from megalite.report.page import differences, state_of, write_report
from megalite.report.remarks import remarks, slow_ranks
from megalite.report.run_directory import read_run, read_runs
from megalite.report.timing import draw_pipeline, find_sample
from tools.report import main

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    monkeypatch.setattr(style, "_DPI", 30)


def metrics_row(step, **more):
    plain = {
        "step": step, "loss": 5.0 - 0.01 * step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64 * step, "step_seconds": 0.1,
        "tokens_per_second": 640.0, "tflops_per_device": 0.1, "mfu": None, "memory_gib": 1.5, "validation_loss": None,
        "save_stall_seconds": 0.0, "skipped_samples": 0, "rollbacks": 0, "validation_seconds": 0.0, "time": 1e9 + step,
    }  # fmt: skip
    return plain | more


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ranks(run, shape, work, steps=40):
    """Timelines of all ranks of a (pp, dp, cp, tp) mesh; `work[rank]` are the seconds of its forward."""
    for rank, seconds in enumerate(work):
        place, rest = {}, rank
        for axis in ("tp", "cp", "dp", "pp"):
            rest, place[axis] = divmod(rest, shape[axis])
        rows = [{"rank": rank, "host": f"node{rank}", "shape": shape, **place}]
        parts = dict.fromkeys(PHASES, 0.0) | {"forward": seconds, "wait_others": 1.0 - seconds}
        rows += [{"first": step, "last": step, "steps": 1, "seconds": parts} for step in range(1, steps + 1)]
        operations = [[f"{place['pp']}F0", -1.0 + 0.2 * place["pp"], -0.7 + 0.2 * place["pp"]]]
        operations.append([f"{place['pp']}B0", -0.5 - 0.1 * place["pp"], -0.3 - 0.1 * place["pp"]])
        rows.append({"step": 25, "operations": operations, "waits": []})
        write(run / "timeline" / f"rank_{rank:05d}.jsonl", rows)


def make_run(run, plan=80, **config):
    train = {"steps": plan, "precision": "fp32"} | config
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in train.items())
    run.mkdir(parents=True)
    (run / "config.toml").write_text(
        f"[model]\nlayers = 2\nhidden_size = 8\n[parallel]\npipeline = 2\n[train]\n{lines}"
    )
    write(run / "metrics.jsonl", [metrics_row(step) for step in range(1, 81)])
    events = [{"event": "start", "time": 1e9 - 5, "ranks": 4, "host": "node0"}]
    events += [{"event": "ready", "time": 1e9, "step": 0}, {"event": "stop", "time": 1e9 + 90, "code": 0}]
    write(run / "events.jsonl", events)
    write_ranks(run, {"pp": 2, "dp": 2, "cp": 1, "tp": 1}, [0.2, 0.2, 0.5, 0.5])
    return run


def page_of(*runs, output):
    return write_report(read_runs(list(runs)), output).read_text()


@pytest.mark.fast
def test_the_page_needs_nothing_else_and_every_picture_is_a_file_too(tmp_path):
    page = page_of(make_run(tmp_path / "run"), output=tmp_path / "out")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page) and "http" not in re.sub(
        r"data:image[^\"]*", "", page
    )
    pictures = [base64.b64decode(text) for text in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert sorted(pictures) == sorted(files.values()) and all(content.startswith(PNG) for content in pictures)
    assert set(files) == {
        "loss.png", "gradient_norm.png", "learning_rate.png", "throughput.png", "utilisation.png", "step_time.png",
        "memory.png", "goodput.png", "breakdown_ranks.png", "breakdown_steps.png", "pipeline.png",
    }  # fmt: skip
    assert "finished" in page and "80 of 80" in page
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.fast
def test_nothing_on_the_page_is_wider_than_a_phone():
    style_sheet = resources.files("megalite.report").joinpath("page.html").read_text().partition("</style>")[0]
    fixed = re.findall(r"(?<![-\w])(?:min-width|width|minmax\()\s*:?\s*([\d.]+)(px|rem)", style_sheet)
    assert all(float(size) * {"px": 1, "rem": 16}[unit] <= 160 for size, unit in fixed), fixed
    assert "minmax(min(400px, 100%), 1fr)" in style_sheet and 'name="viewport"' in style_sheet


def empty(run):
    write(run / "metrics.jsonl", [])


def one_step(run):
    write(run / "metrics.jsonl", [metrics_row(1)])


def not_finite(run):
    write(run / "metrics.jsonl", [metrics_row(step, loss=None, grad_norm=None) for step in range(1, 90)])


def nan_between(run):
    rows = [metrics_row(step, loss=None if step % 3 else 1.0 * step) for step in range(1, 90)]
    write(run / "metrics.jsonl", rows)


def cut_short(run):
    for file in run.rglob("*.jsonl"):
        content = file.read_bytes()
        file.write_bytes(content[: random.Random().randrange(len(content))])


def garbage(run):
    for file in run.rglob("*.jsonl"):
        file.write_bytes(b"\xff\x00{]}\n[1, 2]\n42\n" + file.read_bytes())
    (run / "config.toml").write_text("= no toml")


def only_metrics(run):
    for name in ("config.toml", "events.jsonl"):
        (run / name).unlink()
    for file in (run / "timeline").iterdir():
        file.unlink()


def only_config(run):
    for file in run.rglob("*.jsonl"):
        file.unlink()


def old_metrics(run):
    """Lines as they were before times were kept, and of another program: half of the fields."""
    write(run / "metrics.jsonl", [{"step": step, "loss": 3.0, "tokens": 8 * step} for step in range(1, 20)])


def no_tokens(run):
    write(run / "metrics.jsonl", [{"step": 1}, {"step": "two"}])


def unknown_events(run):
    strange = [
        {"event": "comet", "time": 2.0, "tail": "<b>long</b>"},
        {"event": "rollback", "time": 3.0},
        {"event": "slow", "time": 3.0, "rank": 1},
        {"event": 3, "time": 4.0},
        {"event": "no_answer", "time": 5.0},
        {"time": 6.0},
    ]
    write(run / "events.jsonl", [{"event": "start", "time": 1.0}, *strange])


def one_rank_short(run):
    (run / "timeline" / "rank_00003.jsonl").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        empty, one_step, not_finite, nan_between, cut_short, garbage, only_metrics, only_config, old_metrics, no_tokens,
        unknown_events, one_rank_short,
    ],
)  # fmt: skip
def test_whatever_is_missing_the_rest_is_shown(tmp_path, damage):
    run = make_run(tmp_path / "run")
    damage(run)
    page = page_of(run, output=tmp_path / "out")
    assert "</html>" in page and "<b>long" not in page
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG)


def test_runs_are_compared_field_by_field(tmp_path):
    paths = [
        make_run(tmp_path / name / "run", **more) for name, more in (("a", {}), ("b", {"z_loss": 1e-4, "steps": 90}))
    ]
    runs = read_runs(paths)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert sorted(differences(runs)) == [("train.steps", ["80", "90"]), ("train.z_loss", ["–", "0.0001"])]
    assert [state_of(run) for run in runs] == ["finished", "stopped early"]
    page = page_of(*paths, output=tmp_path / "out")
    assert "train.z_loss" in page and "a/run" in page
    assert {"pipeline_1.png", "pipeline_2.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.fast
def test_a_slow_rank_stands_out_from_its_peers_and_a_heavy_stage_does_not(tmp_path):
    run = make_run(tmp_path / "run")
    assert slow_ranks(read_run(run, "run").ranks) == {}
    write_ranks(run, {"pp": 2, "dp": 2, "cp": 1, "tp": 1}, [0.2, 0.26, 0.5, 0.5])
    found = read_run(run, "run")
    assert slow_ranks(found.ranks) == {1: ("1.30 times the work of its peers", True)}
    assert [remark.text for remark in remarks(found)] == ["Rank 1 (node1) is slow: 1.30 times the work of its peers."]
    assert "Rank 1 (node1) is slow" in page_of(run, output=tmp_path / "out")


@pytest.mark.fast
def test_measured_operations_are_simulated_with_their_own_durations(tmp_path):
    run = read_run(make_run(tmp_path / "run"), "run")
    sample = find_sample(run)
    assert sample.step == 25 and sample.ranks == [0, 2]
    assert sample.operations[0][0][1:] == (0.0, pytest.approx(0.3)) and sample.operations[1][0][1] == pytest.approx(0.2)
    titles = [axes.get_title() for axes in draw_pipeline(sample).axes]
    assert "step 25, measured: 700.0 ms" in titles[0]
    assert "Simulated" in titles[1] and "1,000.0 ms" in titles[1]  # 0F 300, 1F 300, 1B 200, 0B 200: nothing overlaps


@pytest.mark.fast
def test_smoothing_passes_over_outliers_and_gaps():
    values = np.linspace(1, 2, 300)
    values[[50, 120]] = 1e9
    values[200:204] = np.nan
    assert np.abs(smooth(values) - np.linspace(1, 2, 300)).max() < 0.02
    assert np.isnan(smooth([float("nan")] * 5)).all() and len(smooth([])) == 0


def test_more_ranks_than_a_picture_holds(tmp_path):
    run = make_run(tmp_path / "run")
    work = [0.3] * 100
    work[77] = 0.9
    write_ranks(run, {"pp": 1, "dp": 100, "cp": 1, "tp": 1}, work, steps=2)
    page = page_of(run, output=tmp_path / "out")
    assert "Rank 77 (node77) is slow: 3.00 times the work of its peers." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a directory; name the run.dir of a run"),
        (["."], ". holds none of metrics.jsonl, config.toml, events.jsonl"),
        (["run", "run/../run"], "is named twice"),
        (["run", "--output", "run/config.toml"], "--output run/config.toml cannot be made"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    output = [] if "--output" in arguments else ["--output", "out"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments, *output])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert message in said.err and len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_is_a_users_mistake(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").mkdir()
    with pytest.raises(UserError, match=r"loss\.png"):
        page_of(run, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.partial"))

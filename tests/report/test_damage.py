"""Whatever stands in a run's files, the report is made, and nothing of it becomes part of the page's own text."""

import json
import math
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.observe.timeline import PHASES
from megalite.report import page, style
from megalite.report.page import write_report
from megalite.report.run_directory import read_runs

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 2**53, 2**63, 10**400, 1.2e14, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["<script>alert(1)</script>", "\ud800", "$\\frac{", "_hidden", "\x00", '"><img src=x>', "{{ 7 * 7 }}"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
METRICS = {
    "step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64, "step_seconds": 0.1, "tokens_per_second": 640.0,
    "tflops_per_device": 0.1, "mfu": 0.4, "memory_gib": 1.5, "validation_loss": 2.5, "save_stall_seconds": 0.0,
    "skipped_samples": 0, "rollbacks": 0, "validation_seconds": 0.0, "time": 1e9,
}  # fmt: skip
EVENTS = [
    {"event": "start", "time": 1e9, "ranks": 2, "host": "node", "job": "7"},
    {"event": "ready", "time": 1e9 + 1, "step": 0},
    {"event": "slow", "time": 1e9 + 2, "rank": 1, "step": 50, "seconds": 0.5, "median": 0.1},
    {"event": "lost", "time": 1e9 + 2, "to_step": 1, "steps": 3, "seconds": 1.0, "until": 1e9 + 1},
    {
        "event": "rollback",
        "time": 1e9 + 3,
        "step": 9,
        "to_step": 1,
        "why": "a spike",
        "samples": [3, 9],
        "seconds": 1.0,
    },
    {"event": "damaged", "time": 1e9 + 3, "step": 9, "why": "the copies of w are not the same"},
    {"event": "rollback", "time": 1e9 + 3, "step": 9, "to_step": 1, "why": "as above", "seconds": 1.0},
    {"event": "flipped_bit", "time": 1e9 + 4, "step": 9, "rank": 1, "host": "node"},
    {"event": "no_answer", "time": 1e9 + 4, "ranks": [1]},
    {"event": "save_failed", "time": 1e9 + 4, "step": 3, "why": "full"},
    {"event": "refused", "time": 1e9 + 4, "step": 3, "loss": "nan", "grad_norm": "nan"},
    {"event": "empty", "time": 1e9 + 4, "step": 3, "samples": [1, 2]},
    {"event": "stop", "time": 1e9 + 5, "code": 0, "signal": None},
]
TIMELINE = [
    {"rank": 0, "host": "node", "shape": {"pp": 1, "dp": 1, "cp": 1, "tp": 1}, "pp": 0, "dp": 0, "cp": 0, "tp": 0},
    {"first": 1, "last": 2, "steps": 2, "seconds": dict.fromkeys(PHASES, 0.1), "memory_gib": 1.0},
    {"first": 3, "last": 4, "steps": 2, "seconds": dict.fromkeys(PHASES, 0.2)},
    {"step": 3, "operations": [["0F0", -1.0, -0.5], ["0B0", -0.5, 0.0]], "waits": [["pp", -1.0, -0.9]]},
]
CONFIG = {"model.layers": 2, "train.steps": 80, "parallel.pipeline": 2, "train.precision": "fp32", "model": 1}


@st.composite
def damaged(draw, rows):
    """Lines of the rows, with some fields odd, missing or new, and some lines cut or no JSON at all."""
    lines = []
    for row in rows:
        row = dict(row)
        for field in draw(st.lists(st.sampled_from([*row, "new"]), max_size=3)):
            row[field] = draw(ODD)
        line = json.dumps(row).encode("utf-8")
        kind = draw(st.sampled_from(["whole"] * 6 + ["cut", "garbage", "deep", "digits"]))
        odd = {"garbage": b"\xff\x00{]", "deep": b'{"a":' * 2000, "digits": b'{"step": ' + b"9" * 5000 + b"}"}
        lines.append(line[: len(line) // 2] if kind == "cut" else odd.get(kind, line))
    return b"\n".join(lines) + b"\n"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = set(), set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attributes}


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.seen, parser.attributes


FILES = {
    "metrics": damaged([METRICS | {"step": step, "tokens": 64 * step} for step in range(1, 8)]),
    "events": damaged(EVENTS),
    "timeline": damaged(TIMELINE),
    "config": st.dictionaries(st.sampled_from(sorted(CONFIG)), st.one_of(st.integers(), st.text("ab<$&", max_size=8))),
    "complaint": st.text(max_size=60),
}
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def make_page(folder, metrics, events, timeline, config, complaint):
    run = folder / "<b>_$x$ & run"
    for folder in ("timeline", "log"):
        (run / folder).mkdir(parents=True)
    (run / "metrics.jsonl").write_bytes(metrics)
    (run / "events.jsonl").write_bytes(events)
    (run / "timeline" / "rank_00000.jsonl").write_bytes(timeline)
    (run / "timeline" / "rank_00001.jsonl").mkdir()
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    (run / "config.toml").write_text(text)
    line = f"2026-01-01 10:00:00 WARNING {complaint}"
    (run / "log" / "rank_00000.log").write_text(line, encoding="utf-8", errors="replace")
    return write_report(read_runs([run]), run.parent / "out").read_text(encoding="utf-8")


@settings(max_examples=60, **QUICK)
@given(**FILES)
def test_words_of_damaged_files(tmp_path_factory, **files):
    """Summary, remarks and history are always made, and no value becomes a tag or an attribute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda runs, scores: ())
        seen, attributes = tags(make_page(tmp_path_factory.mktemp("damage"), **files))
    own = "html head meta title style body main h1 h2 p section img div table tr th td span ul li details summary pre"
    assert seen <= set(own.split())
    assert not {name for name in attributes if name.startswith("on")}


@settings(max_examples=4, **QUICK)
@given(**FILES)
def test_pictures_of_damaged_files(tmp_path_factory, **files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "_DPI", 20)
        assert "</html>" in make_page(tmp_path_factory.mktemp("damage"), **files)


@pytest.mark.fast
@pytest.mark.parametrize("text", ["a$b$c", "_hidden", "tab\tnew\nline\x00", "\ud800", "plain"])
def test_names_are_drawn_as_they_are(text):
    shown = style.plain(text)
    assert not shown.startswith("_") and "$" not in shown.replace(r"\$", "") and shown.isprintable()
    assert style.plain("plain") == "plain"

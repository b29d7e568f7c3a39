"""Scores of evaluations on the report's page: one checkpoint, several, the steps of a run; damaged files refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import UserError
from megalite.report import curves, style
from megalite.report.page import write_report
from megalite.report.run_directory import Run
from megalite.report.scores import draw_scores, read_scores
from tools.report import main

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_DPI", 30)


def line(checkpoint: str, task: str, score: float, **more: Any) -> dict[str, Any]:
    return {"task": task, "score": score, "stderr": 0.01, "n": 100, "shots": 5, "checkpoint": checkpoint} | more


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_checkpoints_side_by_side(tmp_path: Path) -> None:
    lines = [
        line("runs/$one", "mmlu", 0.3),
        line("runs/_two", "mmlu", 0.4),
        line("runs/$one", "gsm8k", 0.1, stderr=None),
    ]
    lines += [{"task": "all", "score": 0.2, "stderr": None, "n": 3, "shots": None}, line("runs/$one", "mmlu", 0.35)]
    scores = read_scores([write(tmp_path / "a.jsonl", lines)])
    assert {(one.name, one.task, one.score) for one in scores} == {
        *(("$one", "mmlu", 0.35), ("_two", "mmlu", 0.4), ("$one", "gsm8k", 0.1))
    }
    figure = draw_scores(scores)
    assert figure is not None
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["mmlu", "gsm8k"]
    heights = sorted(bar.get_height() for container in axes.containers for bar in getattr(container, "patches", ()))
    assert heights == [0.1, 0.35, 0.4]


def test_steps_of_a_run_are_a_line(tmp_path: Path) -> None:
    lines = [line(f"runs/a/checkpoints/step_{step:08d}", "mmlu", step / 100) for step in (30, 10, 20)]
    scores = read_scores([write(tmp_path / "a.jsonl", lines)])
    figure = draw_scores(scores)
    assert figure is not None
    (drawn,) = [one for one in figure.axes[0].get_lines() if len(one.get_xdata()) == 3 and one.get_marker() == "o"]
    assert list(drawn.get_xdata()) == [10, 20, 30]
    assert list(drawn.get_ydata()) == [0.1, 0.2, 0.3]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any run; the picture is a file too."""
    file = write(tmp_path / "a.jsonl", [line("runs/<b>", "mmlu", 0.3)])
    page = write_report([], tmp_path / "out", read_scores([file])).read_text()
    assert "0.3000 ± 0.0100" in page and "&lt;b&gt;" in page and "<b>" not in page.replace("<b>:", "")
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["report.py", "--output", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "name a run directory, or a file of scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        *("no json\n", "[1]\n", '{"task": "mmlu"}\n', '{"task": "m", "score": NaN}\n', '{"task": 1, "score": 2}\n'),
        '{"task": "m", "score": 1' + "0" * 400 + "}\n",
        *(f'{{"task": "m", "score": 1, "n": {value}}}\n' for value in ("null", "NaN", "Infinity", "1e999", "-1")),
        *(f'{{"task": "m", "score": 1, "stderr": {value}}}\n' for value in ("NaN", "Infinity", "1" + "0" * 400, "-1")),
        *(f'{{"task": "m", "score": 1, "shots": {value}}}\n' for value in ("NaN", "Infinity", "[]")),
    ],
)
def test_damaged_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not a line of tools/evaluate\.py"):
        read_scores([tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match="cannot be read"):
        read_scores([tmp_path / "missing.jsonl"])


def test_names_in_the_picture_of_evaluations() -> None:
    """A run's name is made a label once: what shows is the name."""
    rows = [{"tokens": 1, "mmlu_bits_per_byte": 2.0}]
    figure = curves.draw_evaluations([Run(Path(name), name, {}, rows, []) for name in ("$5", "_b")])
    assert figure is not None
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == [r"mmlu, \$5", "mmlu, _b"]

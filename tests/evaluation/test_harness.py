"""The same numbers as lm-evaluation-harness with transformers' model: for its own prompts, and as its model."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megalite.errors import UserError
from megalite.evaluation import gsm8k, humaneval, mmlu
from megalite.evaluation.data import load
from megalite.evaluation.progress_bar import Progress
from megalite.evaluation.results import Result
from megalite.evaluation.service import Service
from megalite.evaluation.text_model import TextModel
from megalite.generation.loading import open_checkpoint
from tests.evaluation import support
from tests.evaluation.test_service import LAYOUTS, ask, in_layout
from tests.support.pool import Pool

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'megalite[eval]'")

QUIET = Progress(quiet=True)
NEW_TOKENS = 24
PACKAGE = Path(lm_eval.__file__).parent / "tasks"

harness = pytest.importorskip("megalite.evaluation.harness")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that reads all prompts, one that has to cut them, and data."""
    made = tmp_path_factory.mktemp("harness")
    support.make_checkpoint(made / "long", positions=3000)
    support.make_checkpoint(made / "short", "qwen3_qknorm", positions=420)
    support.write_data(made / "data", np.random.default_rng(), rows=7)
    return made


@pytest.fixture(scope="module")
def peers(folder: Path) -> Callable[[str], Any]:
    """lm-evaluation-harness's model over transformers', by the checkpoint's name."""
    pytest.importorskip("accelerate", reason="accelerate is not installed, without which lm_eval has no hf model")
    from lm_eval.models.huggingface import HFLM

    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = HFLM(str(folder / name), dtype="float32", device="cpu", batch_size=8)
        return made[name]

    return make


def yaml_of(path: str) -> dict[str, Any]:
    """A task file of the library, without its functions; what it includes first."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    found = yaml.load((PACKAGE / path).read_text(), Loader)
    if "include" in found:
        found = yaml_of(str(Path(path).parent / found.pop("include"))) | found
    return found


def library_task(path: str, files: dict[str, Path], **overrides: Any) -> dict[str, Any]:
    """The library's own task, reading local files."""
    config = yaml_of(path) | {"dataset_path": "json", "dataset_name": None} | overrides
    config["dataset_kwargs"] = {"data_files": {split: str(file) for split, file in files.items()}}
    for field in ("tag", "group", "task_alias"):
        config.pop(field, None)
    return config


def run_library(model: Any, tasks: list[dict[str, Any]], shots: int | None = None, **more: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        manager = TaskManager(include_defaults=False)
        return lm_eval.simple_evaluate(
            model, tasks=tasks, num_fewshot=shots, task_manager=manager, bootstrap_iters=0, **more
        )


def mmlu_tasks(folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """One of the library's tasks for each subject."""
    data, tasks = load("mmlu", str(folder / "data")), []
    for subject in sorted({row["subject"] for row in data["test"]}):
        files = {}
        for split in ("dev", "test"):
            files[split] = scratch / f"{subject}_{split}.jsonl"
            support.write_jsonl(files[split], [row for row in data[split] if row["subject"] == subject])
        about = yaml_of("mmlu/default/mmlu_abstract_algebra.yaml")["description"]
        about = about.replace("abstract algebra", subject.replace("_", " "))
        tasks.append(library_task("mmlu/default/_default_template_yaml", files, task=subject, description=about))
    return tasks


def gsm8k_task(folder: Path, kind: str = "gsm8k", **more: Any) -> dict[str, Any]:
    data = folder / "data" / "gsm8k"
    files = {"train": data / "train.jsonl", "test": data / "test.jsonl"}
    config = library_task(f"gsm8k/{kind}.yaml", files, **more)
    config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": NEW_TOKENS}
    return config


def humaneval_task(folder: Path, scratch: Path) -> dict[str, Any]:
    """The library's own, but for its metric, whose code it would download."""
    file = scratch / "humaneval.jsonl"
    support.write_jsonl(file, load("humaneval", str(folder / "data"))["test"])
    config = library_task("humaneval/humaneval.yaml", {"test": file}, metric_list=[{"metric": "bypass"}])
    config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": NEW_TOKENS}
    config.pop("filter_list")
    return config


def ours(service: Service, folder: str, name: str, shots: int | None, cot: bool = False) -> dict[str, Result]:
    """Our three commands."""
    with open_checkpoint(Path(folder) / name) as opened:
        model = TextModel.of(service, opened)
        data = {task: load(task, f"{folder}/data") for task in ("mmlu", "gsm8k", "humaneval")}
        return {
            "mmlu": mmlu.evaluate(model, data["mmlu"], QUIET, shots=shots),
            "gsm8k": gsm8k.evaluate(model, data["gsm8k"], QUIET, shots=shots, max_new_tokens=NEW_TOKENS),
            "humaneval": humaneval.evaluate(model, data["humaneval"], QUIET, max_new_tokens=NEW_TOKENS),
        }


@pytest.mark.parametrize(
    ("name", "shots"), [("long", None), pytest.param("long", 0, marks=pytest.mark.slow), ("short", 3)]
)
def test_the_three_commands(
    folder: Path, peers: Callable[[str], Any], tmp_path: Path, name: str, shots: int | None
) -> None:
    """Prompts letter for letter, log-likelihoods, texts, and scores to the last digit; with prompts that are cut."""
    found = ask(0, {}, str(folder / name), lambda service: ours(service, str(folder), name, shots))
    peer = peers(name)
    library = run_library(peer, mmlu_tasks(folder, tmp_path), 5 if shots is None else shots)
    samples = [sample for task in sorted(library["samples"]) for sample in by_id(library["samples"][task])]
    records = found["mmlu"].records
    assert [record["prompt"] for record in records] == [sample["arguments"][0][0] for sample in samples]
    assert [record["id"] for record in records] == [
        f"{task}/{number}" for task in sorted(library["samples"]) for number in range(len(library["samples"][task]))
    ]
    logprobs = np.array([record["logprobs"] for record in records])
    expected = np.array([[float(one[0][0]) for one in sample["resps"]] for sample in samples])
    assert np.abs(logprobs - expected).max() < 1e-4
    for task, (score, _) in found["mmlu"].more["subjects"].items():
        assert score == library["results"][task]["acc,none"]
    check_gsm8k(found["gsm8k"], run_library(peer, [gsm8k_task(folder)], shots), "gsm8k")
    library = run_library(peer, [humaneval_task(folder, tmp_path)], confirm_run_unsafe_code=True)
    samples = by_id(library["samples"]["humaneval"])
    records = found["humaneval"].records
    assert [record["prompt"] for record in records] == [sample["arguments"][0][0] for sample in samples]
    assert [record["text"] for record in records] == [sample["resps"][0][0] for sample in samples]


def check_gsm8k(found: Result, library: dict[str, Any], task: str) -> None:
    strict = [sample for sample in library["samples"][task] if sample["filter"] == "strict-match"]
    loose = [sample for sample in library["samples"][task] if sample["filter"] == "flexible-extract"]
    records, scores = found.records, library["results"][task]
    assert [record["prompt"] for record in records] == [sample["arguments"][0][0] for sample in by_id(strict)]
    assert [record["text"] for record in records] == [sample["resps"][0][0] for sample in by_id(strict)]
    assert [record["answer"] for record in records] == [sample["filtered_resps"][0] for sample in by_id(strict)]
    assert [record["flexible"] for record in records] == [sample["filtered_resps"][0] for sample in by_id(loose)]
    assert found.score == scores["exact_match,strict-match"]
    assert found.more["flexible"] == scores["exact_match,flexible-extract"]


def by_id(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


@pytest.mark.fast
def test_prompts_of_the_official_subjects() -> None:
    """The description of each of the library's 57 tasks is ours."""
    files = sorted((PACKAGE / "mmlu" / "default").glob("mmlu_*.yaml"))
    assert len(files) >= 57
    for file in files:
        config = yaml.safe_load(file.read_text().replace("!function", ""))
        assert mmlu.description(config["dataset_name"]) == config["description"], file.name


def test_gsm8k_without_a_train_split(folder: Path, peers: Callable[[str], Any], tmp_path: Path) -> None:
    """The examples that the wheel records become those of the library's gsm8k_cot."""
    examples = yaml_of("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
    recorded = "".join(
        f"Question: {one['question']}\nAnswer: {one['target'].replace('The answer is', 'So the answer is')}\n\n"
        for one in examples
    )
    rows = support.gsm8k_rows(np.random.default_rng(), 5)
    support.write_jsonl(tmp_path / "test.jsonl", rows)
    requests = [{"doc": row, "request": {"context": f"{recorded}Question: {row['question']}\nAnswer:"}} for row in rows]
    support.write_jsonl(tmp_path / "wheel" / "requests.jsonl.gz", requests)
    data = load("gsm8k", str(tmp_path / "wheel"))

    def evaluate(service: Service) -> Result:
        with open_checkpoint(folder / "long") as opened:
            return gsm8k.evaluate(TextModel.of(service, opened), data, QUIET, max_new_tokens=NEW_TOKENS)

    found = ask(0, {}, str(folder / "long"), evaluate)
    config = library_task("gsm8k/gsm8k-cot.yaml", {"test": tmp_path / "test.jsonl"})
    config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": NEW_TOKENS}
    check_gsm8k(found, run_library(peers("long"), [config], 5), "gsm8k_cot")


@pytest.mark.fast
def test_answers_are_read_as_the_library_reads_them() -> None:
    """Strict, flexible and equal, on random texts full of numbers."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    config, random = yaml_of("gsm8k/gsm8k.yaml"), np.random.default_rng()
    patterns = [step["filter"][0] for step in config["filter_list"]]
    filters = [
        RegexFilter(**{name: value for name, value in pattern.items() if name != "function"}) for pattern in patterns
    ]
    ignored = {name: config["metric_list"][0][name] for name in ("regexes_to_ignore", "ignore_case")}
    pieces = ["#### ", "1,234", "-7", "$3.50", "12.", "The answer is", "abc", "\n", " ", "0", ".", "-", "$", "A", ","]
    for _ in range(500):
        text = "".join(random.choice(pieces, size=random.integers(0, 9)))
        gold = f"so {random.choice(pieces)}\n#### {random.choice(['1,234', '-7', '3.50', '12', '0'])}"
        answers = gsm8k.strict(text, gsm8k.TRAIN), gsm8k.flexible(text)
        assert list(answers) == [one.apply([[text]], [{}])[0][0] for one in filters], text
        for answer in answers:
            verdict = exact_match_hf_evaluate(predictions=[answer], references=[gold], **ignored)
            assert gsm8k.same(answer, gold) == bool(verdict["exact_match"]), (answer, gold)


def all_kinds(folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """Tasks of every kind of request: multiple choices, rolling, generation with settings of its own."""
    random = np.random.default_rng(5)
    texts = [support.words(random, 5, 30) for _ in range(6)] + [support.words(random, 200, 220)]
    support.write_jsonl(scratch / "texts.jsonl", [{"text": text} for text in texts])
    rows = support.mmlu_rows(random, 2, 21)
    support.write_jsonl(scratch / "choices.jsonl", rows)
    data = {"dataset_path": "json", "test_split": "test"}

    def files(name: str) -> dict[str, Any]:
        return {"dataset_kwargs": {"data_files": {"test": str(scratch / f"{name}.jsonl")}}}

    choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{question}} "}
    choices |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    choices |= {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}]}
    rolling = {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    rolling |= {"metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]}
    writing = {"task": "writing", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": ""}
    writing |= {
        "generation_kwargs": {"until": [" a", "\n"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [
        data | choices | files("choices"),
        data | rolling | files("texts"),
        data | writing | files("texts"),
        gsm8k_task(folder),
    ]


def as_its_model(service: Service, folder: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    with open_checkpoint(folder) as opened:
        return outcome(run_library(harness.adapter(TextModel.of(service, opened), QUIET), tasks))


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    samples = {
        task: [(sample["arguments"], sample["resps"]) for sample in by_id(samples)]
        for task, samples in found["samples"].items()
    }
    return {"results": found["results"], "samples": samples}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("short", {}),
        pytest.param("long", {}, marks=pytest.mark.slow),
        pytest.param("long", {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_as_its_model(
    pool: Pool, folder: Path, peers: Callable[[str], Any], tmp_path: Path, name: str, layout: dict[str, int]
) -> None:
    """Two hundred requests of all kinds through the library, with this model and with transformers'."""
    tasks = all_kinds(folder, tmp_path)
    found = in_layout(pool, layout, folder / name, as_its_model, str(folder / name), tasks)
    expected = outcome(run_library(peers(name), tasks))
    assert sum(len(responses) for samples in found["samples"].values() for _, responses in samples) >= 160
    for task, samples in expected["samples"].items():
        for (arguments, responses), (own_arguments, own) in zip(samples, found["samples"][task], strict=True):
            assert own_arguments == arguments
            check_responses(task, own, responses)
    for task, metrics in expected["results"].items():
        for metric, value in metrics.items():
            close = isinstance(value, float) and ("perplexity" in metric or "bits" in metric)
            assert found["results"][task][metric] == (pytest.approx(value, rel=1e-5) if close else value), metric


def check_responses(task: str, own: Any, responses: Any) -> None:
    for (one,), (other,) in zip(own, responses, strict=True):
        if task == "rolling":
            assert float(one) == pytest.approx(float(other), rel=1e-6, abs=1e-4)
        elif isinstance(other, str) and task in ("writing", "gsm8k"):
            assert one == other
        else:
            assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-4)
            assert str(one[1]) == str(other[1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_scores_in_every_layout(pool: Pool, folder: Path, layout: dict[str, int]) -> None:
    """Equal to the last digit, texts too; log-likelihoods to rounding."""
    alone = ask(0, {}, str(folder / "short"), lambda service: ours(service, str(folder), "short", 3))
    found = in_layout(pool, layout, folder / "short", ours, str(folder), "short", 3)
    for task, result in found.items():
        assert result.line() == alone[task].line(), task
        for one, other in zip(result.records, alone[task].records, strict=True):
            assert one.get("text") == other.get("text")
            assert one.get("logprobs") == pytest.approx(other.get("logprobs"), abs=1e-4)


# As a user calls it


def evaluate(service: Service, folder: Path, options: Any) -> list[Result]:
    with open_checkpoint(folder / "long") as opened:
        return harness.evaluate(TextModel.of(service, opened), options, QUIET)


def test_local_tasks_and_the_cache(folder: Path, tmp_path: Path) -> None:
    """The task files for local data give our commands' scores; a second call asks the model nothing."""
    data, cache = str(folder / "data"), str(tmp_path / "cache")
    options = harness.Options(["local_mmlu", "local_gsm8k"], data=data, cache=cache)

    def both(service: Service) -> list[Any]:
        with open_checkpoint(folder / "long") as opened:
            model = TextModel.of(service, opened)
            first = harness.evaluate(model, options, QUIET)
            own = [
                mmlu.evaluate(model, load("mmlu", data), QUIET),
                gsm8k.evaluate(model, load("gsm8k", data), QUIET),
            ]
            service.loglikelihoods = service.generate = None  # type: ignore[assignment,method-assign]
            return [first, own, harness.evaluate(model, options, QUIET)]

    first, own, again = ask(0, {}, str(folder / "long"), both)
    assert [(one.score, one.n, one.shots) for one in first] == [(one.score, one.n, one.shots) for one in own]
    assert [one.line() for one in first] == [one.line() for one in again]
    for one, other in zip(first, own):
        assert [record["prompt"] for record in one.records] == [record["prompt"] for record in other.records]
        assert [record["correct"] for record in one.records] == [record["correct"] for record in other.records]
    assert json.dumps([record for one in first for record in one.records])


CHAT = """\
{%- for message in messages -%}
<s>{{ message['role'] }}: {{ message['content'] | trim }}</s>
{% endfor -%}
{%- if add_generation_prompt -%}<s>assistant:{%- endif -%}
"""


@pytest.mark.parametrize("prefix", [None, "So"])
def test_chat_templates(folder: Path, tmp_path: Path, prefix: str | None) -> None:
    """The conversations that the library makes of examples, and how they are tokenized, are transformers'."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    checkpoint = support.make_checkpoint(tmp_path / "chat", positions=3000)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    tasks = [gsm8k_task(folder, gen_prefix=prefix), all_kinds(folder, tmp_path)[0] | {"gen_prefix": prefix}]
    more = {"apply_chat_template": True, "system_instruction": "Be brief"}

    def evaluate_own(service: Service) -> dict[str, Any]:
        with open_checkpoint(checkpoint) as opened:
            return outcome(run_library(harness.adapter(TextModel.of(service, opened), QUIET), tasks, 2, **more))

    found = ask(0, {}, str(checkpoint), evaluate_own)
    peer = HFLM(str(checkpoint), dtype="float32", device="cpu", batch_size=8)
    expected = outcome(run_library(peer, tasks[:1], 2, **more))
    for (arguments, responses), (own_arguments, own) in zip(
        expected["samples"]["gsm8k"], found["samples"]["gsm8k"], strict=True
    ):
        assert "<s>system: Be brief</s>" in arguments[0][0]
        assert own_arguments == arguments
        assert own == responses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["local_mmlo"]}, "--tasks: local_mmlo is unknown; did you mean local_mmlu"),
        ({"tasks": ["zzzzqqq"]}, "--tasks: zzzzqqq is unknown; --include-path DIR"),
        ({"tasks": ["local_mmlu"]}, "local_mmlu reads local data; name them with --data"),
        ({"tasks": ["local_humaneval"], "data": "DATA"}, "allow it with --allow-code-execution"),
        (
            {"tasks": ["local_gsm8k"], "data": "DATA", "shots": 10},
            "10 worked examples are asked for; the train split has 9",
        ),
        ({"tasks": ["local_mmlu"], "data": "DATA", "include_path": "/nowhere"}, "--include-path /nowhere: no such"),
    ],
)
def test_mistakes(folder: Path, options: dict[str, Any], message: str) -> None:
    options = {name: str(folder / "data") if value == "DATA" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        ask(0, {}, str(folder / "long"), lambda service: evaluate(service, folder, harness.Options(**options)))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test asks the network for data, or leaves any behind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    yield

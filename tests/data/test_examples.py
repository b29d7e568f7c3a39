"""Packed rows, prompts, and the files that a recipe names: what a row holds, who makes it, what is refused."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.config import build_config
from megalite.config.check import _check_data, check_bounds, check_machine
from megalite.data import index_cache
from megalite.data.batches import Batches
from megalite.data.examples import PackedExamples, PromptDataset
from megalite.errors import UserError
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.text import example_cache
from megalite.text.preprocess import PreprocessOptions, preprocess
from megalite.text.tokenizers import ByteTokenizer
from megalite.train import example_inputs
from megalite.train.example_inputs import describe_examples, open_examples
from megalite.train.inputs import open_data

pytestmark = pytest.mark.fast
EOD = 256
KINDS = {"sft": "sft", "preference": "dpo", "prompt": "grpo"}


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return np.random.default_rng(seed)


def letters(rng, most: int) -> str:
    return "".join(map(chr, rng.integers(97, 123, rng.integers(1, most + 1))))


def records(rng, form: str, count: int, most: int = 12) -> list[dict]:
    def one(number: int) -> dict:
        prompt = letters(rng, most)
        if form == "sft":
            return {"prompt": prompt, "completion": letters(rng, most)}
        if form == "prompt":
            return {"prompt": prompt, "answer": number}
        return {"prompt": prompt, "chosen": letters(rng, most), "rejected": letters(rng, most), "margin": number / 8}

    return [one(number) for number in range(count)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(folder: Path, form: str, files: list, seq_length: int = 64, **sections):
    tables = {
        "run": {"dir": str(folder / "run"), "device": "cpu", "seed": 5},
        "model": {"layers": 2, "hidden_size": 24, "heads": 2, "vocab_size": 257, "max_positions": 512},
        "data": {"train": files, "tokenizer": "byte"} | sections.pop("data", {}),
        "train": {"steps": 6, "seq_length": seq_length, "global_batch_size": 4} | sections.pop("train", {}),
        "log": {"tensorboard": False},
        "objective": {"kind": KINDS[form]},
        **sections,
    }
    return build_config(tables)


def tokenise(folder: Path, form: str, source: str, name: str = "p", **options) -> str:
    preprocess(
        PreprocessOptions([source], str(folder / name), tokenizer_type="byte", format=form, **options),
        show_progress=False,
    )
    return str(folder / f"{name}_text_document")


def batch_of(data: PackedExamples, rows: int, first: int = 0):
    with Batches(data, micro_batch_size=rows, ahead=0) as batches:
        return batches.next_batch(first, rows)[0]


def documents(batch, b: int) -> list[slice]:
    """The documents of a row with the padding at its end, if any."""
    numbers = batch.documents_BS[b]
    edges = [0, *(1 + torch.nonzero(numbers[1:] != numbers[:-1]).flatten()).tolist(), len(numbers)]
    assert numbers[edges[:-1]].tolist() == list(range(len(edges) - 1))
    return [slice(*pair) for pair in itertools.pairwise(edges)]


@pytest.mark.parametrize("form", ["sft", "preference"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_row_holds_whole_examples_with_their_own_labels(tmp_path, rng, form, packing):
    rows = records(rng, form, 40)
    config = recipe(tmp_path, form, [write(tmp_path / "a.jsonl", rows)], seq_length=77, data={"packing": packing})
    data, none = open_data(config)
    assert isinstance(data, PackedExamples) and none is None
    count = len(data.plan(0))
    batch = batch_of(data, count)
    assert (
        batch.tokens_BS.shape == batch.labels_BS.shape == (count, 77) and batch.columns["ends"].dtype == torch.float32
    )
    names = ["completion"] if form == "sft" else ["chosen", "rejected"]
    expected = {(row["prompt"] + row[name], answer): (row, name) for row in rows for answer, name in enumerate(names)}
    seen = []
    for b in range(count):
        parts = documents(batch, b)
        real = [part for part in parts if batch.columns["ends"][b, part].any()]
        assert len(parts) - len(real) <= 1 and (packing or len(real) == len(names))
        for number, part in enumerate(real):
            ids, labels = batch.tokens_BS[b, part].tolist(), batch.labels_BS[b, part].tolist()
            assert batch.positions_BS[b, part].tolist() == list(range(len(ids)))
            assert batch.columns["ends"][b, part].tolist() == [0.0] * (len(ids) - 1) + [1.0]
            assert ids[-1] == EOD and labels[-1] == IGNORE_INDEX
            row, name = expected[(bytes(ids[:-1]).decode(), number % len(names))]
            start = len(row["prompt"])
            assert labels == [IGNORE_INDEX] * (start - 1) + ids[start:] + [IGNORE_INDEX]
            seen.append((row["prompt"] + row[name], name))
            if form == "preference":
                margin = row["margin"] if name == "chosen" else 0.0
                assert batch.columns["margins"][b, part].tolist() == [0.0] * (len(ids) - 1) + [margin]
        if len(parts) > len(real):
            padding = parts[-1]
            assert (batch.labels_BS[b, padding] == IGNORE_INDEX).all() and not batch.tokens_BS[b, padding].any()
    assert sorted(seen) == sorted((row["prompt"] + row[name], name) for row in rows for name in names)


def test_rows_go_on_through_epochs_and_any_one_is_computed_alone(tmp_path, rng):
    config = recipe(tmp_path, "sft", [write(tmp_path / "a.jsonl", records(rng, "sft", 30))])
    data, _ = open_data(config)
    epochs = [len(data.plan(epoch)) for epoch in range(4)]
    assert [data.locate(number)[0] for number in (0, epochs[0] - 1, epochs[0], sum(epochs[:3]))] == [0, 0, 1, 3]
    assert sum(len(data.members(number)) for number in range(epochs[0], sum(epochs[:2]))) == 30
    number = int(rng.integers(sum(epochs)))
    alone = open_data(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=99)))[0]
    assert torch.equal(batch_of(alone, 1, number).tokens_BS, batch_of(data, 1, number).tokens_BS)
    first = [data.members(number) for number in range(epochs[0])]
    assert first != [data.members(epochs[0] + number) for number in range(min(epochs[:2]))]


def test_every_layout_reads_the_same_batches(tmp_path, rng):
    data, _ = open_data(recipe(tmp_path, "preference", [write(tmp_path / "a.jsonl", records(rng, "preference", 30))]))
    whole = batch_of(data, 12)
    for dp in (2, 3):
        rows = {}
        for rank in range(dp):
            with Batches(data, micro_batch_size=2, dp_rank=rank, dp_size=dp) as batches:
                for micro, batch in enumerate(batches.next_batch(0, 12)):
                    for b in range(2):
                        rows[micro * 2 * dp + rank * 2 + b] = (batch, b)
        for number, (batch, b) in rows.items():
            assert torch.equal(batch.labels_BS[b], whole.labels_BS[number])
            assert torch.equal(batch.documents_BS[b], whole.documents_BS[number])
            assert torch.equal(batch.columns["margins"][b], whole.columns["margins"][number])


def test_overlong_examples_are_dropped_or_cut(tmp_path):
    rows = [{"prompt": "p" * 10, "completion": "c" * n} for n in (3, 30)] + [{"prompt": "p" * 40, "completion": "c"}]
    source = write(tmp_path / "a.jsonl", rows)
    line = check_inputs_of(recipe(tmp_path, "sft", [source], seq_length=20))
    assert "1 conversation, 2 too long left out" in line
    config = recipe(tmp_path, "sft", [source], seq_length=20, data={"overlong": "truncate"})
    assert "2 conversations, 1 with nothing to learn left out, 1 cut" in check_inputs_of(config)
    data, _ = open_data(config)
    assert data.examples.parts[0].selection.learned == 4 + 10
    batch = batch_of(data, 2)
    assert sorted((batch.labels_BS != IGNORE_INDEX).sum(1).tolist()) == [4, 10]
    pairs = [{"prompt": "p", "chosen": "c" * chosen, "rejected": "r" * 3} for chosen in (3, 50)]
    config = recipe(tmp_path, "preference", [write(tmp_path / "b.jsonl", pairs)], 20, data={"overlong": "truncate"})
    data, _ = open_data(config)
    assert sorted(data.examples.parts[0].selection.lengths.tolist()) == [[5, 5], [15, 5]]
    with pytest.raises(UserError, match=r"none of its 2 examples is left: 2 are longer than train.seq_length = 4"):
        open_data(recipe(tmp_path, "preference", [str(tmp_path / "b.jsonl")], 4))


@pytest.mark.parametrize("room", [20, 21])
def test_of_a_pair_the_longer_answer_is_cut_first(tmp_path, rng, room):
    pairs = [
        {"prompt": "p", "chosen": "c" * chosen, "rejected": "r" * rejected}
        for chosen, rejected in rng.integers(1, 30, (60, 2))
    ]
    config = recipe(tmp_path, "preference", [write(tmp_path / "a.jsonl", pairs)], room, data={"overlong": "truncate"})
    selection = open_data(config)[0].examples.parts[0].selection
    assert selection.lengths.dtype == np.int32 and len(selection) == 60
    for pair, used in zip(pairs, selection.lengths.tolist(), strict=True):
        expected = [2 + len(pair["chosen"]), 2 + len(pair["rejected"])]
        while sum(expected) > room:
            expected = [length - (length == max(expected)) for length in expected]
        assert used == expected


def test_prompts_are_never_cut(tmp_path):
    rows = [{"prompt": "x" * 60}, {"prompt": "y" * 5}]
    source = write(tmp_path / "a.jsonl", rows)
    for overlong in ("drop", "truncate"):
        config = recipe(tmp_path, "prompt", [source], data={"overlong": overlong}, rollout={"max_new_tokens": 8})
        data, _ = open_data(config)
        assert [data.prompt(number).text for number in range(len(data))] == ["y" * 5]
        assert "1 prompt, 1 too long left out" in check_inputs_of(config)


def test_a_file_that_is_split_is_opened_once(tmp_path, rng, monkeypatch):
    source = write(tmp_path / "a.jsonl", records(rng, "sft", 40))
    split = {"data": {"split": [3, 1]}, "train": {"eval_interval": 2, "eval_samples": 4}}
    done = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: done.append(name) or function(*given))

    count(example_inputs, "ExampleFile")
    count(example_cache, "file_sha256")
    for again in (False, True):
        done.clear()
        train, valid = open_data(recipe(tmp_path, "sft", [source], **split))
        assert sorted(done) == ["ExampleFile", "file_sha256"], again
    assert train.examples.parts[0].file is valid.examples.parts[0].file


def test_the_tokenizer_is_loaded_once(tmp_path, rng, monkeypatch):
    names = ["a.jsonl", "b.jsonl"]
    config = recipe(tmp_path, "sft", [write(tmp_path / name, records(rng, "sft", 5)) for name in names])
    open_data(config)  # tokenised from now on
    loaded = []
    make = ByteTokenizer.__init__
    monkeypatch.setattr(ByteTokenizer, "__init__", lambda tokenizer: loaded.append(make(tokenizer)))
    open_examples(config, 24, tmp_path / "megalite_cache")
    assert len(loaded) == 1


@pytest.mark.parametrize("kind", ["examples_text_document.json", "arrays.json"])
def test_a_folder_that_another_node_made_first_is_kept(tmp_path, rng, monkeypatch, kind):
    config = recipe(tmp_path, "sft", [write(tmp_path / "a.jsonl", records(rng, "sft", 9))])
    rename, beaten = os.rename, []

    def late(made, final):
        if (Path(made) / kind).is_file():
            shutil.copytree(made, final)
            beaten.append(final)
        rename(made, final)

    monkeypatch.setattr(index_cache.os, "rename", late)
    assert open_data(config)[0].examples.per_epoch == 9
    assert beaten and not list((tmp_path / "megalite_cache").glob("*.tmp-*"))


def check_inputs_of(config) -> str:
    """What `--check` says of a recipe's data."""
    check_bounds(config)
    check_machine(config)
    samples, _ = open_data(config)
    return ", ".join(describe_examples(config, samples))


def test_prefixes_and_raw_files_give_the_same_rows(tmp_path, rng):
    source = write(tmp_path / "a.jsonl", records(rng, "preference", 20))
    prefix = tokenise(tmp_path, "preference", source)
    fields = [open_data(recipe(tmp_path, "preference", [train]))[0].fields() for train in (source, prefix)]
    assert fields[0] == fields[1]
    shuffled = open_data(recipe(tmp_path, "preference", [source], run={"dir": str(tmp_path / "run"), "seed": 6}))[0]
    assert shuffled.fields()["order"] != fields[0]["order"]
    made = list((tmp_path / "megalite_cache").glob("*/examples_text_document.json"))
    assert len(made) == 1
    stamp = made[0].stat().st_mtime_ns
    open_data(recipe(tmp_path, "preference", [source]))
    assert made[0].stat().st_mtime_ns == stamp
    assert not list((tmp_path / "megalite_cache").glob("*.tmp-*"))


def test_several_files_are_mixed_by_weight_or_taken_whole(tmp_path, rng):
    first = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": letters(rng, 9)} for _ in range(30)])
    second = write(tmp_path / "b.jsonl", [{"prompt": "b", "completion": letters(rng, 9)} for _ in range(10)])

    def share(train) -> float:
        data, _ = open_data(recipe(tmp_path, "sft", train))
        batch = batch_of(data, len(data.plan(0)))
        starts = batch.tokens_BS[(batch.positions_BS == 0) & (batch.tokens_BS > 0)]
        assert len(starts) == 40
        return float((starts == ord("a")).double().mean())

    assert share([first, second]) == 0.75
    assert share([[0.2, first], [0.8, second]]) == pytest.approx(0.2, abs=0.03)


def test_a_split_and_valid_files_share_nothing_with_training(tmp_path, rng):
    source = write(tmp_path / "a.jsonl", records(rng, "sft", 40))
    train, valid = open_data(
        recipe(tmp_path, "sft", [source], data={"split": [3, 1]}, train={"eval_interval": 2, "eval_samples": 4})
    )
    used = [set(part.examples.parts[0].selection.numbers.tolist()) for part in (train, valid)]
    assert used == [set(range(30)), set(range(30, 40))] and len(valid) == 4
    other = write(tmp_path / "b.jsonl", records(rng, "sft", 5))
    config = recipe(tmp_path, "sft", [source], data={"valid": [other]}, train={"eval_interval": 2})
    assert open_data(config)[1].examples.per_epoch == 5


def test_prompts_by_number(tmp_path, rng):
    rows = [*records(rng, "prompt", 15), {"prompt": "x" * 60, "answer": -1}]
    config = recipe(tmp_path, "prompt", [write(tmp_path / "a.jsonl", rows)], rollout={"max_new_tokens": 8})
    data, _ = open_data(config)
    assert isinstance(data, PromptDataset) and len(data) == 15
    assert "15 prompts, 1 too long left out" in check_inputs_of(config)
    for epoch in range(3):
        prompts = [data.prompt(epoch * 15 + number) for number in range(15)]
        assert sorted(prompt.columns["answer"] for prompt in prompts) == list(range(15))
        for prompt in prompts:
            assert prompt.text == rows[prompt.columns["answer"]]["prompt"] and prompt.ids == list(prompt.text.encode())
    number = int(rng.integers(1000))
    assert data.prompt(number) == open_data(config)[0].prompt(number)
    assert [data.prompt(n).text for n in range(15)] != [data.prompt(15 + n).text for n in range(15)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a"}', r"a.jsonl:2: missing key: no field 'completion'"),
        ('{"prompt": "a", "completion": ""}', r"a.jsonl:2: empty answer"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"a.jsonl:2: nothing to learn"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"a.jsonl:2: chat template: .*name a file or chatml"),
        ("{broken", r"a.jsonl:2: broken JSON"),
    ],
)
def test_a_bad_record_of_a_raw_file_is_one_line(tmp_path, line, why):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=why):
        open_data(recipe(tmp_path, "sft", [str(tmp_path / "a.jsonl")]))
    assert not [path for path in (tmp_path / "megalite_cache").iterdir() if path.suffix != ".lock"]


def test_a_template_that_hides_the_answer_is_refused(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(tmp_path / "a.jsonl", [{"messages": talk}])
    config = recipe(tmp_path, "sft", [source], data={"chat_template": str(tmp_path / "t.jinja")})
    with pytest.raises(UserError, match=r"a.jsonl:1: chat template: message 1: .*t.jinja does not write this answer"):
        open_data(config)


def test_files_made_for_something_else_are_refused(tmp_path, rng):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(tmp_path / "a.jsonl", [{"messages": talk}] * 3)
    prefix = tokenise(tmp_path, "sft", source, chat_template="chatml")
    with pytest.raises(UserError, match=r"made with --format sft, and this objective learns from preference"):
        open_data(recipe(tmp_path, "preference", [prefix]))
    with pytest.raises(UserError, match=r"made with the chat template chatml \(.*, and the recipe's is none"):
        open_data(recipe(tmp_path, "sft", [prefix]))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"the chat template chatml .* the recipe's is .*t.jinja"):
        open_data(recipe(tmp_path, "sft", [prefix], data={"chat_template": str(tmp_path / "t.jinja")}))
    description = json.loads(Path(f"{prefix}.json").read_text())
    description["tokenizer"]["sha256"] = "0" * 64
    Path(f"{prefix}.json").write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"made with the tokenizer byte \(sha256 000000.*data.tokenizer = byte is another"
    ):
        open_data(recipe(tmp_path, "sft", [prefix], data={"chat_template": "chatml"}))


def test_a_learn_mask_of_another_file_is_refused(tmp_path, rng):
    for name in ("a", "b"):
        tokenise(tmp_path, "sft", write(tmp_path / f"{name}.jsonl", records(rng, "sft", 9)), name)
    for end in ("bin", "idx", "json"):
        (tmp_path / f"b_learn_document.{end}").rename(tmp_path / f"a_learn_document.{end}")
    with pytest.raises(UserError, match=r"a_learn_document: not the file that was made with .*a_text_document"):
        open_data(recipe(tmp_path, "sft", [str(tmp_path / "a_text_document")]))


def test_ids_need_no_tokenizer(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": [1, 2], "completion": [3, 4]}])
    config = recipe(tmp_path, "sft", [source], data={"tokenizer": ""})
    batch = batch_of(open_data(config)[0], 1)
    assert batch.tokens_BS[0, :5].tolist() == [1, 2, 3, 4, 0] and batch.labels_BS[0, :4].tolist() == [-100, 3, 4, -100]
    source = write(tmp_path / "c.jsonl", [{"prompt": [], "completion": [5, 6]}])  # nothing predicts the first token
    assert (
        open_data(recipe(tmp_path, "sft", [source], data={"tokenizer": ""}))[0].examples.parts[0].selection.learned == 1
    )
    source = write(tmp_path / "b.jsonl", [{"prompt": [1, 2], "completion": [300]}])
    with pytest.raises(UserError, match=r"b.jsonl:1: .*token id 300 is outside the vocabulary of 257"):
        open_data(recipe(tmp_path, "sft", [source], data={"tokenizer": ""}))


def test_the_recipe_is_checked_before_anything_is_read(tmp_path, rng):
    source = write(tmp_path / "a.jsonl", records(rng, "sft", 3))
    text = recipe(tmp_path, "sft", [source])
    text = dataclasses.replace(text, objective=dataclasses.replace(text.objective, kind="next_token"))
    with pytest.raises(UserError, match=r"a.jsonl, and objective.kind = next_token reads token files"):
        check_machine(text)
    with pytest.raises(UserError, match=r"names none.jsonl, which does not exist"):
        check_machine(recipe(tmp_path, "sft", ["none.jsonl"]))
    with pytest.raises(UserError, match=r"data.chat_template = .*none.jinja.* does not exist"):
        check_machine(recipe(tmp_path, "sft", [source], data={"chat_template": "none.jinja"}))
    with pytest.raises(UserError, match=r"data.chat_template = .*chatml.* needs a tokenizer"):
        check_machine(recipe(tmp_path, "sft", [source], data={"chat_template": "chatml", "tokenizer": ""}))


def test_fields_without_an_effect_are_refused(tmp_path):
    config = recipe(tmp_path, "sft", ["a.jsonl"], data={"mask_end_of_document": True})
    with pytest.raises(UserError, match=r"data.mask_end_of_document = true has no effect on the examples of .* sft"):
        _check_data(config)


def wait_and_read(rank: int, folder: str, source: str) -> tuple[str, int]:
    data, _ = open_data(recipe(Path(folder), "sft", [source]))
    return data.fields()["order"], sum(data.members(0))


def test_ranks_that_start_together_tokenise_once(tmp_path, rng, pool):
    source = write(tmp_path / "a.jsonl", records(rng, "sft", 200))
    assert len(set(pool.run(wait_and_read, 3, str(tmp_path), source))) == 1
    assert len(list((tmp_path / "megalite_cache").glob("*/examples_text_document.bin"))) == 1

"""Records to token files of examples: every column form, what cannot be used, workers and resuming."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError
from megalite.text import preprocess_shard
from megalite.text.chat import ChatTemplate
from megalite.text.example_encoder import ExampleEncoder, Unusable
from megalite.text.preprocess import PreprocessOptions, preprocess
from megalite.text.tokenizers import ByteTokenizer

pytestmark = pytest.mark.fast
EOD = 256
TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


def raw(text: str) -> list[int]:
    return list(text.encode())


def encoder(form: str, tokenizer=None, **options) -> ExampleEncoder:
    tokenizer = tokenizer or ByteTokenizer()
    return ExampleEncoder(form, tokenizer, ChatTemplate.load(tokenizer, "chatml"), **options)


def talk(*contents: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents)]


def learned(example) -> list[int]:
    return [token for token, on in zip(example.ids, example.learn, strict=True) if on]


def test_every_form_of_a_conversation():
    encode = encoder("sft").encode
    [example] = encode({"messages": talk("a", "b", "c", "d")}).examples
    assert learned(example) == [*raw("b"), EOD, *raw("d"), EOD]
    [example] = encode({"prompt": talk("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}).examples
    assert learned(example) == [*raw("d"), EOD]
    [example] = encode({"prompt": "1 + 1 =", "completion": " 2"}).examples
    assert example.ids == [*raw("1 + 1 = 2"), EOD] and learned(example) == [*raw(" 2"), EOD]
    [example] = encode({"prompt": [5, 6], "completion": [7, 8]}).examples
    assert example.ids == [5, 6, 7, 8] and learned(example) == [7, 8]
    [example] = encode({"messages": talk("a", "b"), "completion": None, "prompt": None}).examples
    assert learned(example) == [*raw("b"), EOD]


def test_every_form_of_a_pair():
    encode = encoder("preference").encode
    for record in (
        {"prompt": "x ", "chosen": "good", "rejected": "bad", "margin": 2},
        {"chosen": "x good", "rejected": "x bad", "margin": 2},
    ):
        encoded = encode(record)
        assert [bytes(learned(example)[:-1]).decode().strip() for example in encoded.examples] == ["good", "bad"]
        assert all(example.ids[-1] == EOD for example in encoded.examples) and encoded.columns == {"margin": 2.0}
    shared = talk("q", "a", "p")
    for record in (
        {"chosen": [*shared, *talk("", "yes")[1:]], "rejected": [*shared, *talk("", "no")[1:]]},
        {"prompt": shared, "chosen": talk("", "yes")[1:], "rejected": talk("", "no")[1:]},
        {"prompt": shared, "chosen": "yes", "rejected": "no"},
    ):
        chosen, rejected = encode(record).examples
        assert learned(chosen) == [*raw("yes"), EOD] and learned(rejected) == [*raw("no"), EOD]
        first = chosen.learn.index(True)
        assert first == rejected.learn.index(True) and chosen.ids[:first] == rejected.ids[:first]
    chosen, rejected = encode({"chosen": [1, 2, 3, 4], "rejected": [1, 2, 5]}).examples
    assert (learned(chosen), learned(rejected)) == ([3, 4], [5])


def test_a_prompt_keeps_its_columns_and_its_text():
    encode = encoder("prompt").encode
    encoded = encode({"prompt": "2+2=", "answer": 4, "note": None})
    assert encoded.examples[0].ids == raw("2+2=")
    assert encoded.columns == {"prompt": "2+2=", "answer": 4, "note": None}
    encoded = encode({"prompt": talk("2+2?"), "answer": 4})
    assert encoded.examples[0].ids[-14:] == raw("<|assistant|>\n")
    assert encoded.columns["prompt"].endswith("<|assistant|>\n")


def test_a_prompt_of_messages_is_rendered_once(monkeypatch):
    encode, rendered = encoder("prompt").encode, []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *given: rendered.append(render(*given)) or rendered[-1])
    encoded = encode({"prompt": talk("2+2?")})
    assert [one.text for one in rendered] == [encoded.columns["prompt"]]
    assert encoded.examples[0].ids == encoder("prompt").template.ids(talk("2+2?"), True)


@pytest.mark.parametrize(
    ("form", "record", "why"),
    [
        ("sft", {"text": "x"}, "no field 'messages', or 'prompt' and 'completion'; fields there: 'text'"),
        ("sft", {"prompt": "x"}, "no field 'completion'"),
        ("sft", {"prompt": "x", "completion": ""}, "field 'completion' is empty"),
        ("sft", {"messages": talk("x")}, "no message of the assistant"),
        ("sft", {"messages": talk("x", "")}, "message 1 of field 'messages' is an empty answer"),
        ("sft", {"messages": [{"content": "x"}]}, "give an object with a role and a content"),
        ("sft", {"messages": "x"}, "give a list of messages"),
        ("sft", {"prompt": [1, 300], "completion": [2]}, "token id 300 is outside the vocabulary of 257"),
        ("sft", {"prompt": 5, "completion": "x"}, "field 'prompt' holds 5; give a text, messages or token ids"),
        ("sft", {"prompt": [], "completion": [2]}, "no token of it can be learned"),
        ("sft", {"messages": None, "prompt": [], "completion": [2]}, "field 'completion': no token of it can be"),
        ("preference", {"prompt": "x", "chosen": "y"}, "no field 'rejected'"),
        ("preference", {"prompt": "x", "chosen": "y", "rejected": ""}, "field 'rejected' is empty"),
        ("preference", {"chosen": "y", "rejected": "z"}, "do not begin alike"),
        ("preference", {"prompt": "x", "chosen": "y", "rejected": "z", "margin": float("nan")}, "not a finite number"),
        ("preference", {"prompt": "x", "chosen": "y", "rejected": [1]}, "of two kinds"),
        ("prompt", {"question": "x"}, "no field 'prompt'; fields there: 'question'"),
        ("prompt", {"prompt": ""}, "field 'prompt' is empty"),
    ],
)
def test_a_record_that_gives_no_example_is_told(form, record, why):
    with pytest.raises(Unusable, match=why):
        encoder(form).encode(record)


def test_without_a_tokenizer_only_ids_are_taken():
    encode = ExampleEncoder("sft", None, None).encode
    assert encode({"prompt": [1], "completion": [70000]}).examples[0].ids == [1, 70000]
    with pytest.raises(Unusable, match="no tokenizer is named"):
        encode({"prompt": "a", "completion": "b"})
    with pytest.raises(Unusable, match="no chat template; name a file or chatml"):
        ExampleEncoder("sft", ByteTokenizer(), None).encode({"messages": talk("a", "b")})


def write_pairs(path: Path, count: int, chance) -> list[dict]:
    records = [
        {
            "prompt": "p" * chance.randrange(1, 40),
            "chosen": "c" * chance.randrange(1, 40),
            "rejected": "r" * chance.randrange(1, 40),
            "margin": chance.random(),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_files_hold_the_examples_whatever_the_workers(tmp_path, chance, monkeypatch):
    monkeypatch.setattr(preprocess_shard, "SMALLEST_SHARD", 900)
    records = write_pairs(tmp_path / "in.jsonl", 60, chance)
    made = []
    for workers in (1, 3):
        options = PreprocessOptions(
            [str(tmp_path / "in.jsonl")], str(tmp_path / f"o{workers}"), tokenizer_type="byte", format="preference",
            workers=workers,
        )  # fmt: skip
        [summary] = preprocess(options, show_progress=False)
        names = [f"{part}_document.{end}" for part in ("text", "learn", "columns") for end in ("bin", "idx")]
        made.append([Path(f"{tmp_path}/o{workers}_{name}").read_bytes() for name in names])
    assert summary.shards > 5 and made[0] == made[1]
    facts = summary.description
    assert facts["format"] == "preference" and facts["margins"] == facts["examples"] == 60
    tokens, learn, columns = (IndexedDataset(f"{tmp_path}/o1_{part}_document") for part in ("text", "learn", "columns"))
    assert np.array_equal(tokens.lengths, learn.lengths) and tokens.documents == 120 and learn.dtype == np.uint8
    for number, record in enumerate(records):
        for answer, name in enumerate(("chosen", "rejected")):
            document = 2 * number + answer
            assert tokens[document].tolist() == [*raw(record["prompt"] + record[name]), EOD]
            assert learn[document].tolist() == [0] * len(record["prompt"]) + [1] * (len(record[name]) + 1)
        assert json.loads(columns[number].tobytes()) == {"margin": record["margin"]}


def test_parquet_and_compressed_files_give_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = [{"messages": talk("a" * n, "b" * n)} for n in range(1, 30)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    made = []
    for name in ("a.jsonl.zst", "b.parquet"):
        options = PreprocessOptions(
            [str(tmp_path / name)], f"{tmp_path}/{name[0]}", tokenizer_type="byte", format="sft", chat_template="chatml"
        )
        made.append(preprocess(options, show_progress=False)[0].description["fingerprint"])
    assert made[0] == made[1]


def test_the_program_names_bad_records_and_ends_with_2(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')

    def run(*extra: str):
        words = ["--input", f"{tmp_path}/in.jsonl", "--output-prefix", f"{tmp_path}/o", "--tokenizer-type", "byte"]
        return subprocess.run([sys.executable, TOOL, *words, *extra], capture_output=True, text=True)

    done = run("--format", "sft")
    assert done.returncode == 2 and "in.jsonl:2: missing key: no field 'completion'" in done.stderr
    assert not (tmp_path / "o_text_document.bin").exists() and not (tmp_path / "o_learn_document.bin").exists()
    done = run("--format", "sft", "--max-bad-ratio", "0.5")
    assert done.returncode == 0 and "1 document, 3 tokens" in done.stdout and "66.7% of them learned" in done.stdout
    done = run("--format", "sft", "--append-eod")
    assert done.returncode == 2 and "--append-eod is for --format text" in done.stderr
    done = run("--chat-template", "chatml")
    assert done.returncode == 2 and "--chat-template is for --format" in done.stderr


def test_strict_ends_at_the_first_bad_record_with_its_line_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_shard, "SMALLEST_SHARD", 300)
    good = json.dumps({"prompt": "a" * 40, "completion": "b"}) + "\n"
    (tmp_path / "in.jsonl").write_text(good * 30 + '{"prompt": 1, "completion": "b"}\n' + good * 30)
    options = PreprocessOptions(
        [f"{tmp_path}/in.jsonl"], f"{tmp_path}/o", tokenizer_type="byte", format="sft", strict=True
    )
    with pytest.raises(UserError, match=r"in.jsonl:31: wrong field: field 'prompt' holds 1;.*; mend the record"):
        preprocess(options, show_progress=False)

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megalite.errors import UserError
from megalite.text.tokenizer_training import TrainingOptions, train

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


@pytest.mark.fast
def test_program_writes_model_and_list_and_reports(tmp_path, source_texts) -> None:
    rows = [json.dumps({"text": text[start : start + 2000]}) for text in source_texts[:20] for start in (0, 2000, 4000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"text": 5}']))
    done = subprocess.run(
        [
            sys.executable,
            TOOL,
            "--input",
            tmp_path / "a.jsonl",
            "--vocab-size",
            "800",
            "--output-prefix",
            tmp_path / "t",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bytes per token on" in done.stdout and "held-out text" in done.stdout
    assert "1 record, not text" in done.stdout and "a.jsonl:61" in done.stdout
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert model.vocab_size() == 800
    listed = (tmp_path / "t.vocab").read_text().split("\n")
    assert [row.split("\t")[0] for row in listed[:7]] == [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<0x00>",
    ]
    assert len(listed) == 801
    pieces = [model.id_to_piece(number) for number in range(800)]
    assert not [piece for piece in pieces if sum(map(str.isdigit, piece)) > 1 and not piece.startswith("<0x")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "t.model", "t.vocab"]


def test_same_input_gives_the_same_model_and_samples_differ_by_seed(tmp_path, source_texts) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in source_texts))
    size = (tmp_path / "a.jsonl").stat().st_size
    models = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        report = train(
            TrainingOptions([str(tmp_path / "a.jsonl")], 600, str(tmp_path / name), max_bytes=size // 3, seed=seed)
        )
        assert size / 10 < report.train_bytes < size / 1.5
        models.append((tmp_path / f"{name}.model").read_bytes())
    assert models[0] == models[1] != models[2]


def test_unusable_requests_are_named(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a few words only"}\n')
    for change, words in [
        ({"vocab_size": 100}, "--vocab-size 100: must be at least"),
        ({"vocab_size": 5000}, r"^--vocab-size 5000: too large for this text; use at most \d+, or more text$"),
        ({"vocab_size": 10**12}, "--vocab-size 1000000000000: must be at most"),
        ({"special_tokens": ["<a>", "<a>"]}, "--special-tokens '<a>': must be printable, and not there already"),
        ({"special_tokens": ["</s>"]}, "--special-tokens '</s>'"),
        ({"special_tokens": ["\udcff"]}, "--special-tokens"),
        ({"json_key": "body"}, "no text in field 'body'.*fields there: 'text'"),
        ({"input": [str(tmp_path / "*.txt")]}, "matches no file"),
    ]:
        options = {
            "input": [str(tmp_path / "a.jsonl")],
            "vocab_size": 300,
            "output_prefix": str(tmp_path / "t"),
            **change,
        }
        with pytest.raises(UserError, match=words):
            train(TrainingOptions(**options))
    assert not list(tmp_path.glob("t*"))

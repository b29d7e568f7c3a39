"""Tokenizer files and texts that mean harm, or were damaged: one line, in bounded time."""

import copy
import io
import json
import os
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from megalite.errors import UserError
from megalite.text.patterns import may_take_forever
from megalite.text.pretokenize import KNOWN
from megalite.text.tokenizers import load_tokenizer

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "the few words <|endoftext|> </s> \u00e9 \n 1234 \udcff \u2581" + "a" * 40 + "!"
ODD_VALUES = (None, True, -1, 0, 2**31 - 1, 2**32 - 1, 1e308, "", "(a+)+$", "\u20ac" * 50, [], [[]], {})
WORDS = {"type": "WordLevel", "vocab": {}, "unk_token": "u"}
ODD_OBJECTS = ({"Regex": "("}, {"Regex": "(a*)*b"}, {"type": "BPE"}, WORDS)


@pytest.fixture(scope="module")
def description() -> dict:
    """A small `tokenizer.json` with the expression of Llama 3."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(list(KNOWN)[1]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the few words here and there, then the others"] * 5, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the few words here and there, then the others"] * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


def outcome(path: Path) -> str:
    """Loads the tokenizer and uses it; the message where that is refused. Any other exception fails the test."""
    started = time.process_time()
    try:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode(TEXT))
        tokenizer.decode([0, 5, tokenizer.vocab_size, 10**9, -1])
        message = ""
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000 and str(path.parent) in message
    assert time.process_time() - started < 10
    return message


def places(value: object, above: tuple = ()) -> list[tuple]:
    """The ways to all values in a description, but of long lists and dictionaries the first few alone."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    some = list(items)[:12]
    return [place for key, inner in some for place in [(*above, key), *places(inner, (*above, key))]]


@FUZZ
@given(data=st.data())
def test_changed_tokenizer_json(description: dict, tmp_path: Path, data: st.DataObject) -> None:
    changed = copy.deepcopy(description)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(changed)))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()) or not isinstance(inner, dict):
            inner[place[-1]] = copy.deepcopy(data.draw(st.sampled_from((*ODD_VALUES, *ODD_OBJECTS))))
        else:
            del inner[place[-1]]
        if not places(changed):
            break
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    outcome(tmp_path / "tokenizer.json")


@FUZZ
@given(data=st.data())
def test_changed_sentencepiece_model(model: bytes, tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(model[: data.draw(st.integers(0, len(model)))] if data.draw(st.booleans()) else model)
    for _ in range(data.draw(st.integers(0, 8)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "t.model").write_bytes(changed)
    outcome(tmp_path / "t.model")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"version": ' + "9" * 5000 + "}", "not a Hugging Face tokenizer"),
        ("[" * 100_000, "not a Hugging Face tokenizer"),
        ("[1, 2]", "not a Hugging Face tokenizer"),
        ("\xff\xfe", "not a Hugging Face tokenizer"),
    ],
    ids=["number", "depth", "type", "bytes"],
)
def test_odd_tokenizer_json_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    assert words in outcome(tmp_path / "tokenizer.json")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", r"holds \[\], not a JSON object"),
        ('{"eos_token": ' + "9" * 5000 + "}", "not JSON"),
        ('{"eos_token": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ('{"eos_token": 7}', "eos_token = 7 must be a string or null"),
        ('{"bos_token": {"content": ["a"]}}', "bos_token = .* must be a string or null"),
    ],
    ids=["type", "number", "depth", "token", "content"],
)
def test_odd_configuration_is_named(content: str, words: str, description: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["tokenizer.json", "t.model", "tokenizer_config.json"])
def test_pipes_and_devices_are_refused(name: str, description: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        with pytest.raises(UserError, match=r"cannot be read \(not a regular file\)"):
            load_tokenizer(tmp_path / ("t.model" if name == "t.model" else "tokenizer.json"))


@pytest.mark.fast
def test_large_ids_are_refused_before_the_work_that_grows_with_them(description: dict, tmp_path: Path) -> None:
    changed = copy.deepcopy(description)
    changed["model"]["vocab"]["!"] = 2**31 - 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert "id 2147483646 is too large" in outcome(tmp_path / "tokenizer.json")


@pytest.mark.fast
def test_expressions_without_end_are_refused(description: dict, tmp_path: Path) -> None:
    for expression in ("(a+)+$", "(?:[^)]*|x)*b", r"(?i:\s*a{2,})+", r"((a\)*)b)+", "(([a[b)]]+))*"):
        assert may_take_forever(expression)
    for expression in (*KNOWN, r"(\(\)[)+*]a)+", "(a{2,3})+", "(abc)*", r"a+(b|c)*\++", "[(a+)+]"):
        assert not may_take_forever(expression)
    changed = copy.deepcopy(description)
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert "repeats a repetition" in outcome(tmp_path / "tokenizer.json")
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a|a|aa)+$"  # found by the library alone
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert "it cannot encode this text" in outcome(tmp_path / "tokenizer.json")


@pytest.mark.fast
def test_halves_of_surrogate_pairs_become_replacement_characters(description, model, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "t.model").write_bytes(model)
    for path in ("byte", tmp_path / "tokenizer.json", tmp_path / "t.model"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("a\udcff b\ud83d").tolist() == tokenizer.encode("a\ufffd b\ufffd").tolist()
        size = tokenizer.vocab_size
        ids = tokenizer.encode("a b").tolist()
        assert tokenizer.decode([size, *ids[:1], -1, 10**12, *ids[1:], size + 5]) == tokenizer.decode(ids)

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megalite.errors import UserError
from megalite.text import pretokenize, word_cache
from megalite.text.byte_pairs import make_encoder
from megalite.text.huggingface_tokenizer import HuggingFaceTokenizer
from megalite.text.sentencepiece import SentencePieceTokenizer
from megalite.text.tokenizers import IncrementalDecoder, load_tokenizer, tokenizer_hash

ODD = (
    " \n\r\t'sSdDlLreEVm09._-/(:<|>\u00e9\u0301\u017f\u2028\x85\x1c\u200b\u4f60\U0001f600\u216b\u00bd\u01c5\u0627\u0903"
)
ODD += "\ufeff\u3000\xa0\u2581\u212a\U0001d400\U00020000\u0378\0"
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def odd_texts(chance: random.Random, count: int) -> list[str]:
    """Texts of the characters that splitters and normalisers treat differently, and of words."""
    pieces = [*ODD, *ODD, "self", " the", "    ", "return", "\n\n", "don't", "<|endoftext|>", "</s>", "1234567"]
    return ["".join(chance.choices(pieces, k=chance.randrange(0, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source_texts):
    """Train a sentencepiece model of any kind; returns its path."""

    def train(**options) -> Path:
        prefix = tmp_path_factory.mktemp("spm") / "m"
        lines = [line for text in source_texts[:30] for line in text.split("\n") if line]
        given_options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700, "minloglevel": 2, **options}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(prefix), **given_options
        )
        return prefix.with_suffix(".model")

    return train


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {  # and whether the cache may be used
    "own settings": ({**PLAIN, "add_dummy_prefix": False}, True),
    "space before the text": (PLAIN, True),
    "words across scripts": ({**PLAIN, "split_by_unicode_script": False, "split_by_number": False}, True),
    "symbols of the user": ({**PLAIN, "user_defined_symbols": ["<a b>", "(x)"]}, False),
    "pieces across spaces": ({**PLAIN, "split_by_whitespace": False}, False),
    "unigram": ({**PLAIN, "model_type": "unigram"}, False),
    "normalised": ({"normalization_rule_name": "nmt_nfkc"}, False),
    "unknown characters": ({**PLAIN, "byte_fallback": False}, False),
}


@pytest.mark.parametrize("case", MODELS)
def test_sentencepiece_ids_are_the_models_own(case, trained, source_texts, chance) -> None:
    options, cached = MODELS[case]
    path = trained(**options)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer._cache is not None) == cached
    texts = [*odd_texts(chance, 400), *source_texts[30:45], "", "\n", " ", "\u2581", "a\u2581 b\n\n"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == model.encode(text), text
    assert (tokenizer._cache is not None) == cached  # nothing made it doubt itself on the way


def test_cache_that_disagrees_is_switched_off(model_path, source_texts, monkeypatch) -> None:
    tokenizer = SentencePieceTokenizer(model_path)
    monkeypatch.setattr(tokenizer._cache, "_encode_words", lambda words: [b"\1\0\0\0"] * len(words))
    assert [ids.tolist() for ids in tokenizer.encode_batch(source_texts[:3])] == [
        SentencePieceTokenizer(model_path, use_cache=False).encode(text).tolist() for text in source_texts[:3]
    ]
    assert tokenizer._cache is None


def test_small_cache_and_long_texts_change_no_id(model_path, source_texts, monkeypatch, chance) -> None:
    tokenizer = SentencePieceTokenizer(model_path)
    monkeypatch.setattr(tokenizer._cache, "_capacity", 3000)
    long_text = "\n".join(source_texts[:10]) + "".join(odd_texts(chance, 50))
    monkeypatch.setattr(word_cache, "SEGMENT_CHARACTERS", 1000)
    monkeypatch.setattr(word_cache.segments, "__defaults__", (1000,))
    whole = SentencePieceTokenizer(model_path, use_cache=False).encode(long_text)
    for _ in range(3):
        assert np.array_equal(tokenizer.encode(long_text), whole)
    assert len(tokenizer._cache._ids) < 2000
    assert len(list(word_cache.segments(long_text, 1000))) > 50
    assert "".join(word_cache.segments(long_text, 1000)) == long_text


@MANY
@given(text=st.text())
def test_every_text_comes_back(model_path, text) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")  # the one exception
    byte = load_tokenizer("byte")
    assert byte.decode(byte.encode(text)) == text


@MANY
@given(text=st.text(st.sampled_from(ODD.replace("\u2581", "") + "ab")))
def test_white_space_and_odd_characters_come_back(model_path, text) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, source_texts):
    def train(name: str, change=None) -> Path:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "_GPT2")
        if name == "_GPT2":
            tokenizer.pre_tokenizer = byte_level
        else:
            split = pre_tokenizers.Split(tokenizers.Regex(getattr(pretokenize, name)), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if name == "_QWEN2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        if change:
            change(tokenizer)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>", "<|im_start|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(source_texts[:20], trainer)
        path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
        tokenizer.save(str(path))
        return path

    return train


@pytest.mark.parametrize("name", ["_GPT2", "_LLAMA3", "_QWEN2", "_O200K"])
def test_hugging_face_ids_are_the_librarys_own(name, hugging_face, source_texts, chance) -> None:
    path = hugging_face(name)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer._cache is not None
    texts = [*odd_texts(chance, 1500), *source_texts[20:35], ""]
    certain = [text for text in texts if tokenizer._splitter.prepare(text) is not None]
    assert len(certain) > 100  # else nothing is tested
    library = tokenizers.Tokenizer.from_file(str(path))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids, repr(text)
    assert tokenizer._cache is not None
    assert tokenizer.decode(tokenizer.encode("a  b\n\té\U0001f600 x")) == "a  b\n\té\U0001f600 x"


def change_description(path: Path, change) -> Path:
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    return path


BYTE_PAIRS = {  # what is changed in a plain tokenizer, and whether its merges may still be made here
    "whole words first": (
        lambda d: d["model"].update(ignore_merges=True, merges=d["model"]["merges"][1::2]),
        True,
    ),
    "a pair learnt twice": (lambda d: d["model"]["merges"].append(d["model"]["merges"][3]), True),
    "merges in another order": (lambda d: d["model"]["merges"].reverse(), True),
    "merges as strings": (lambda d: d["model"].update(merges=[" ".join(m) for m in d["model"]["merges"]]), True),
    "dropout": (lambda d: d["model"].update(dropout=0.0), True),
    "a byte without an entry": (lambda d: d["model"]["vocab"].pop("\u0100"), False),
    "marks at the ends of words": (lambda d: d["model"].update(end_of_word_suffix="!"), False),
    "two entries with one id": (lambda d: d["model"]["vocab"].update(zzzz=700), False),
}


@pytest.mark.parametrize("case", BYTE_PAIRS)
def test_byte_pairs_are_the_librarys_own(case, hugging_face, source_texts, chance) -> None:
    change, own = BYTE_PAIRS[case]
    path = change_description(hugging_face("_LLAMA3"), change)
    tokenizer = load_tokenizer(path)
    assert (tokenizer._cache is not None) == own
    library = tokenizers.Tokenizer.from_file(str(path))
    long_words = ["".join(chance.choices("ab", k=3000)), "=" * 5000, "\u4f60" * 700, "selfself" * 400]
    texts = [*odd_texts(chance, 300), *long_words, *source_texts[20:26]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids, repr(text)
    assert (tokenizer._cache is not None) == own  # nothing made it doubt itself on the way


def test_words_forgotten_and_long_texts_change_no_id(hugging_face, source_texts, monkeypatch, chance) -> None:
    path = hugging_face("_LLAMA3")
    tokenizer = load_tokenizer(path)
    model = json.loads(path.read_text())["model"]
    small, large = (make_encoder(model, tokenizer._splitter.split, capacity) for capacity in (1, 1 << 30))
    monkeypatch.setattr(word_cache.segments, "__defaults__", (1000,))
    texts = ["\n".join(source_texts[:20]), *source_texts[20:30], "", "".join(odd_texts(chance, 50))]
    texts = [ready for text in texts if (ready := tokenizer._splitter.prepare(text)) is not None]
    assert len(set(texts[0].split())) > 1 << 12  # more words than the table first has room for
    library = tokenizers.Tokenizer.from_file(str(path))
    wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):
        for encoder in (small, large):
            assert [ids.tolist() for ids in encoder.encode_batch(texts)] == wanted


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|im_start|>"])
def test_special_tokens_in_a_text(special, hugging_face, model_path) -> None:
    path = hugging_face("_LLAMA3")
    text = f"one {special} two{special}"
    library = tokenizers.Tokenizer.from_file(str(path))
    number = library.token_to_id(special)
    allowed, split = load_tokenizer(path), load_tokenizer(path, allow_special=False)
    assert allowed.encode(text).tolist() == library.encode(text).ids
    assert allowed.encode(text).tolist().count(number) == 2
    library.encode_special_tokens = True
    assert split.encode(text).tolist() == library.encode(text).ids
    assert number not in split.encode(text) and split.decode(split.encode(text)) == text
    assert allowed.count_special(text) == split.count_special(text) == 2
    model = load_tokenizer(model_path)
    assert model.count_special("a</s> <|im_start|> <unk>") == 2 and model.eod not in model.encode("a</s>")


def test_unknown_hugging_face_pipelines_use_the_library(hugging_face, source_texts) -> None:
    def prefix_space(tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def lowercase(tokenizer) -> None:
        tokenizer.normalizer = normalizers.Lowercase()

    for change in (prefix_space, lowercase):
        tokenizer = load_tokenizer(hugging_face("_GPT2", change).parent)
        assert tokenizer._cache is None and tokenizer.encode(source_texts[0]).size > 10


def test_end_of_document(hugging_face, model_path, tmp_path) -> None:
    path = hugging_face("_GPT2")
    assert load_tokenizer(path).eod == 0
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_start|>"}}))
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.eod == 1 and len(tokenizer.files) == 2
    assert tokenizer_hash(tokenizer) != tokenizer_hash(load_tokenizer(model_path))
    model = load_tokenizer(model_path)
    assert (model.eod, model.bos, model.pad) == (2, 1, 3)
    assert model.token_id("<|im_start|>") == 4 and model.token_id("no such piece") is None
    assert 2 not in model.encode("</s><s><|im_start|>")  # text cannot fake a special token


@pytest.mark.parametrize("kind", ["sentencepiece", "byte"])
def test_incremental_decoding_adds_up(kind, model_path, chance) -> None:
    tokenizer = load_tokenizer("byte" if kind == "byte" else model_path)
    for text in [*odd_texts(chance, 100), "\U0001f600", " a b"]:
        text = text.replace("\u2581", "").replace("\ufffd", "")
        decoder = IncrementalDecoder(tokenizer)
        parts = [decoder.feed(token) for token in tokenizer.encode(text)]
        assert "".join(parts) + decoder.finish() == text
        assert not any("\ufffd" in part for part in parts)


def test_unusable_tokenizers_are_named(tmp_path) -> None:
    (tmp_path / "bad.model").write_bytes(b"no model")
    (tmp_path / "bad.json").write_text("{}")
    for path, words in [
        (tmp_path / "none.model", "no such file"),
        (tmp_path / "bad.model", "not a sentencepiece model"),
        (tmp_path / "bad.json", "not a Hugging Face tokenizer"),
        (tmp_path, "tokenizer.json: no such file"),
    ]:
        with pytest.raises(UserError, match=words):
            load_tokenizer(path)
    with pytest.raises(UserError, match="'wordpiece' is unknown"):
        load_tokenizer(tmp_path / "bad.model", "wordpiece")

"""Cleaning whole files: shards, counts, report, rules of the user, resume, and mistakes that end in one line."""

import importlib.util
import io
import random
import resource
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from megalite.errors import UserError
from megalite.text.clean.cleaner import clean_corpus
from megalite.text.clean.rules import load_rules
from megalite.text.jobs import plan_units
from megalite.text.shards import Unusable, read_unit

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "clean_data.py"


def good_text(seed: int) -> str:
    """Twelve sentences that break no rule: made-up words, few of them alike, among stop words."""
    source = random.Random(seed)
    sentences = []
    for _ in range(12):
        words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(4, 8))) for _ in range(9)]
        sentences.append(" ".join([words[0].capitalize(), "the", *words[1:5], "and", *words[5:]]) + ".")
    return " ".join(sentences)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def read_shards(directory: Path) -> list[dict[str, Any]]:
    lines: list[bytes] = []
    for shard in sorted(directory.glob("*.jsonl.zst")):
        with open(shard, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            lines += io.BufferedReader(stream).read().splitlines()
    return [orjson.loads(line) for line in lines]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    records = [{"id": i, "text": good_text(i), "meta": {"source": "test"}} for i in range(40)]
    records[3]["text"] = "too short"
    records[5]["text"] = "buy now " * 100
    records[8]["text"] += " Write to someone@company.org or 8.8.4.4 soon."
    return write_jsonl(tmp_path / "corpus.jsonl", records)


@pytest.mark.fast
def test_program_keeps_fields_counts_by_rule_and_reports(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_tool("--input", corpus, "--output", out, "--keep-rejected", "--workers", 1)
    assert done.returncode == 0, done.stderr
    kept, rejected = read_shards(out), read_shards(out / "rejected")
    assert [record["id"] for record in kept] == [i for i in range(40) if i not in (3, 5)]
    assert kept[0] == {"id": 0, "text": good_text(0), "meta": {"source": "test"}}
    assert kept[6]["text"].endswith("Write to email@example.com or 192.0.2.1 soon.")
    by_rule = {record["id"]: record["rejected_by"] for record in rejected}
    assert by_rule == {3: "gopher_quality.min_words", 5: "gopher_repetition.max_top_ngram_characters[2]"}
    assert next(record for record in rejected if record["id"] == 3)["rejected_value"] == 2

    report = orjson.loads((out / "report.json").read_bytes())
    assert (report["documents"], report["kept"]) == (40, 38)
    assert report["rejected"] == dict(Counter(by_rule.values()))
    assert report["kept_characters"] == sum(len(record["text"]) for record in kept)
    assert report["masked"] == {"email": 1, "ipv4": 1}
    assert sum(report["histograms"]["words/kept"].values()) == 38
    assert sum(report["histograms"]["words/rejected"].values()) == 2
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "gopher_quality.min_words" in done.stdout and "max_top_ngram_characters[2]" in done.stdout
    assert tomllib.loads((out / "rules.toml").read_text()) == load_rules().as_dict()
    assert not list(out.rglob("*.partial"))


def test_output_does_not_depend_on_workers(corpus: Path, tmp_path: Path) -> None:
    second = write_jsonl(tmp_path / "z.jsonl", [{"text": good_text(i), "blob": "x" * 1_000_000} for i in range(5)])
    outs = [tmp_path / "one", tmp_path / "three"]
    for out, workers in zip(outs, (1, 3)):
        done = run_tool("--input", corpus, second, "--output", out, "--workers", workers)
        assert done.returncode == 0, done.stderr
    names = [[shard.name for shard in sorted(out.glob("*.zst"))] for out in outs]
    assert names[0] == names[1] == ["00000_corpus.jsonl.zst", "00001_z.jsonl.zst"]
    for name in names[0]:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


@pytest.mark.fast
def test_ranges_of_a_large_file_give_every_document_once(corpus: Path) -> None:
    units = plan_units([corpus], unit_bytes=3000, pack_bytes=100)
    assert len(units) > 5
    ids = [document.extra["id"] for unit in units for _, document in read_unit(unit, "text", Unusable())]
    assert ids == list(range(40))


@pytest.mark.fast
def test_user_rules_change_the_verdict(corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('rules = ["gopher_quality"]\n[gopher_quality]\nmin_words = 2\nmin_stop_words = 0\n')
    counts, _ = clean_corpus([corpus], tmp_path / "out", load_rules(config))
    assert counts.rejected == {}
    assert counts.masked == {}  # privacy was left out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[gopher_qualty]\nmin_words = 3", "section 'gopher_qualty' is unknown: did you mean 'gopher_quality'?"),
        ("[gopher_quality]\nmin_word = 3", "'min_word' is unknown: did you mean 'min_words'?"),
        ('rules = ["finweb"]', "'finweb' is unknown: did you mean 'fineweb'?"),
        ('[c4]\nmin_sentences = "5"', "c4.min_sentences = '5' must be a whole number"),
        ("[c4]\nmin_sentences = 2.5", "c4.min_sentences = 2.5 must be a whole number"),
        (f"[c4]\nmin_sentences = 1{'0' * 400}", "c4.min_sentences = 1000"),
        (f"[c4]\nmin_sentences = 1{'0' * 5000}", "is not valid TOML"),
        (f"[gopher_quality]\nmax_hash_ratio = 1{'0' * 400}", "max_hash_ratio = 1000"),
        ("[gopher_quality]\nmax_hash_ratio = nan", "max_hash_ratio = nan must be a number"),
        (f"[c4]\nmin_sentences = {'[' * 5000}{']' * 5000}", "is not valid TOML"),
        (f"[c4]\nmin_sentences = '{'x' * 100_000}'", "must be a whole number"),
        ("[gopher_repetition]\nmax_top_ngram_characters = [[1000000000, 0.2]]", "n a whole number from 1 to 100"),
        ("[gopher_repetition]\nmax_top_ngram_characters = [[2, 0.2], [2, 0.3]]", "one pair for each n"),
        ('[words]\nsegmenter = "nltk"', 'words.segmenter = \'nltk\' must be "whitespace" or "spacy"'),
        ('rules = ["words"]', "rules names 'words' is unknown"),
        ('[c4]\nbad_words_file = "/dev/zero"', "bad_words_file = '/dev/zero' cannot be read (not a regular file)"),
        ("[c4]\nreject_curly_bracket = 1", "c4.reject_curly_bracket = 1 must be true or false"),
        ("[fineweb]\nmax_short_lines = -0.1", "fineweb.max_short_lines = -0.1 must be a number of at least 0"),
        ("[fineweb]\nmax_short_lines = nan", "must be a number of at least 0"),
        ("[gopher_repetition]\nmax_top_ngram_characters = [[0, 1]]", "must be a list of [n, share] pairs"),
        ("c4 = 3", "must be a section"),
        ("[c4\n", "is not valid TOML"),
        ('rules = ["language"]', '[language] model = "" names no file'),
        ('rules = ["quality"]\n[quality]\nmodel = "nowhere.bin"', "model = 'nowhere.bin' is not there"),
        ('[c4]\nbad_words_file = "nowhere.txt"', "bad_words_file = 'nowhere.txt' cannot be read"),
    ],
)
def test_wrong_rules_are_named(content: str, message: str, corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "rules.toml"
    config.write_text(content)
    with pytest.raises(UserError) as error:
        clean_corpus([corpus], tmp_path / "out", load_rules(config))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_end_in_one_line_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    (tmp_path / "file").touch()
    cases = [
        (["--input", corpus, "--output", tmp_path / "taken"], "holds other files"),
        (["--input", corpus, "--output", tmp_path / "file"], "is not a directory"),
        (["--input", corpus, "--output", tmp_path / "o", "--key", "body"], "missing key 40"),
    ]
    for arguments, message in cases:
        done = run_tool(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.fast
def test_bad_records_are_counted_and_fail_above_the_ratio(corpus: Path, tmp_path: Path) -> None:
    with open(corpus, "ab") as file:
        file.write(b'{"text": \n{"text": 7}\n\xff\n')
    rules = load_rules()
    with pytest.raises(UserError, match="3 of 43 records cannot be used"):
        clean_corpus([corpus], tmp_path / "strict", rules)
    counts, unusable = clean_corpus([corpus], tmp_path / "lenient", rules, max_bad_ratio=0.1)
    assert counts.documents == 40
    assert sum(unusable.counts.values()) == 3 and len(unusable.counts) == 3
    assert f"{corpus}:41" in unusable.examples[0]


@pytest.mark.fast
def test_an_interrupted_run_goes_on_and_other_rules_are_refused(corpus: Path, tmp_path: Path) -> None:
    second = write_jsonl(tmp_path / "z.jsonl", [{"text": good_text(i), "blob": "x" * 1_000_000} for i in range(5)])
    out, rules = tmp_path / "out", load_rules()
    clean_corpus([corpus, second], out, rules)
    whole = {shard.name: shard.read_bytes() for shard in out.glob("*.zst")}
    assert len(whole) == 2
    # as if the run had been killed before the second unit was done
    (out / "00001_z.jsonl.zst").unlink()
    (out / ".progress" / "clean-00001.json").unlink()
    before = (out / "00000_corpus.jsonl.zst").stat().st_mtime_ns
    counts, _ = clean_corpus([corpus, second], out, rules)
    assert counts.documents == 45
    assert {shard.name: shard.read_bytes() for shard in out.glob("*.zst")} == whole
    assert (out / "00000_corpus.jsonl.zst").stat().st_mtime_ns == before, "the finished unit was done again"
    with pytest.raises(UserError, match="made from other input or settings"):
        clean_corpus([corpus], out, rules)


def test_a_file_that_cannot_grow_ends_in_one_line_and_no_half_shard(corpus: Path, tmp_path: Path) -> None:
    """As on a full disk: writing fails in the middle of a shard, in this process and in a worker's."""
    second = write_jsonl(tmp_path / "z.jsonl", [{"text": good_text(i), "blob": "x" * 1_000_000} for i in range(5)])
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        done = subprocess.run(
            [sys.executable, TOOL, "--input", corpus, second, "--output", out, "--workers", str(workers)],
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        )
        assert done.returncode == 2, done.stderr
        assert "cannot be written" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert not (out / "00000_corpus.jsonl.zst").exists() and not (out / "report.json").exists()


def test_start_up_is_quick_and_without_torch() -> None:
    code = f"import sys; sys.argv = ['clean', '--help']; import runpy\n\
try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n\
except SystemExit: pass\n\
assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, str(TOOL), "--help"], check=True, capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 1


@pytest.mark.skipif(importlib.util.find_spec("fasttext") is None, reason="fasttext is not installed")
def test_language_and_quality_models(tmp_path: Path) -> None:
    """A small model trained here tells two made-up languages apart; its verdicts and scores reach the counts."""
    import fasttext

    source = random.Random(0)
    vocabularies = {"en": ["the", "and", "house", "river"], "xx": ["zug", "bok", "tral", "mip"]}
    labelled = [
        f"__label__{name} " + " ".join(source.choices(words, k=12))
        for _ in range(300)
        for name, words in vocabularies.items()
    ]
    (tmp_path / "train.txt").write_text("\n".join(labelled))
    for attempt in range(20):  # training reads uninitialised memory in this package now and then
        try:
            model = fasttext.train_supervised(
                str(tmp_path / "train.txt"), epoch=20, dim=8, lr=0.05, thread=1, verbose=0
            )
            break
        except RuntimeError:
            assert attempt < 19
    model.save_model(str(tmp_path / "model.bin"))
    texts = [" ".join(source.choices(words, k=60)) for words in vocabularies.values()] + ["river\nhouse\nthe"]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    config = tmp_path / "r.toml"
    config.write_text(f'rules = ["language"]\n[language]\nmodel = "{tmp_path}/model.bin"\nmin_score = 0.6\n')
    counts, _ = clean_corpus([corpus], tmp_path / "language", load_rules(config))
    assert (counts.kept, counts.rejected) == (2, {"language.languages": 1})
    config.write_text(f'rules = ["quality"]\n[quality]\nmodel = "{tmp_path}/model.bin"\nlabel = "__label__xx"\n')
    counts, _ = clean_corpus([corpus], tmp_path / "quality", load_rules(config))
    assert (counts.kept, counts.rejected) == (1, {"quality.min_score": 2})


def test_a_missing_fasttext_is_one_clear_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)
    (tmp_path / "m.bin").touch()
    config = tmp_path / "r.toml"
    config.write_text(f'rules = ["language"]\n[language]\nmodel = "{tmp_path}/m.bin"\n')
    with pytest.raises(UserError, match="needs the package fasttext, which is not installed: pip install"):
        clean_corpus([corpus], tmp_path / "out", load_rules(config))

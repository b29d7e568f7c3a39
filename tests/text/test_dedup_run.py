"""Deduplicating whole corpora: recall and precision on planted copies, determinism, resume, decontamination, report."""

import gzip
import io
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from megalite.errors import UserError
from megalite.text.dedup.deduplication import Deduplication, DedupSummary, Settings
from megalite.text.dedup.minhash import choose_banding
from megalite.text.words import comparable_words
from tests.support.patience import wait_until
from tests.support.processes import is_running

TOOL = Path(__file__).parents[2] / "tools" / "dedup_data.py"


def random_words(source: random.Random, count: int) -> list[str]:
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(count)]


def with_changes(source: random.Random, words: list[str], changes: int) -> list[str]:
    """A copy with some words replaced; each takes at most five shingles away."""
    changed = list(words)
    for place in source.sample(range(len(words)), changes):
        changed[place] = random_words(source, 1)[0]
    return changed


def true_jaccard(first: str, second: str) -> float:
    """By Python sets of word tuples, apart from the code under test."""
    sets = []
    for text in (first, second):
        words = comparable_words(text)
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def read_shards(directory: Path) -> list[dict[str, Any]]:
    lines: list[bytes] = []
    for shard in sorted(directory.glob("*.jsonl.zst")):
        with open(shard, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            lines += io.BufferedReader(stream).read().splitlines()
    return [orjson.loads(line) for line in lines]


def deduplicate(
    paths: list[Path], output: Path, workers: int = 1, memory: int = 1 << 28, threshold: float = 0.8, **changes: Any
) -> DedupSummary:
    settings = Settings(threshold=threshold, banding=choose_banding(threshold), **changes)
    return Deduplication(paths, output, settings, workers, memory).run()


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.fast
def test_planted_copies_recall_and_false_positives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall >= 0.95 at Jaccard >= 0.9 and false positives <= 0.5 % at Jaccard <= 0.5, many runs and key ranges."""
    monkeypatch.setattr("megalite.text.dedup.exact.RUN_DOCUMENTS", 97)
    source = random.Random(11)
    pairs: list[tuple[str, str]] = []
    for number in range(900):
        words = random_words(source, source.randint(150, 500))
        if number % 3 == 0:
            other = with_changes(source, words, max(1, len(words) // 120))
        elif number % 3 == 1:
            other = with_changes(source, words, len(words) // 10)  # some below one half
        else:
            other = random_words(source, len(words) // 2) + words[len(words) // 2 :]  # about a third
        pairs.append((" ".join(words), " ".join(other)))
    records = [{"pair": i, "text": text} for i, pair in enumerate(pairs) for text in pair]
    source.shuffle(records)
    corpus = write_jsonl(tmp_path / "c.jsonl", records)
    summary = deduplicate([corpus], tmp_path / "out", memory=20_000)
    left = dict.fromkeys(range(len(pairs)), 0)
    for record in read_shards(tmp_path / "out"):
        left[record["pair"]] += 1
    similarities = [true_jaccard(*pair) for pair in pairs]
    alike = [i for i, similarity in enumerate(similarities) if similarity >= 0.9]
    different = [i for i, similarity in enumerate(similarities) if similarity <= 0.5]
    assert len(alike) > 250 and len(different) > 250
    assert sum(left[i] == 1 for i in alike) / len(alike) >= 0.95
    assert sum(left[i] == 1 for i in different) / len(different) <= 0.005
    assert min(left.values()) == 1, "both documents of a pair were removed"
    assert summary.removed["near_duplicate"] == sum(count == 1 for count in left.values()) == summary.clusters
    assert summary.kept == sum(left.values())


def corpus_with_copies(directory: Path) -> list[Path]:
    """Two files, far enough apart to be two units, with exact and near copies within and across them."""
    source = random.Random(4)
    base = [random_words(source, 200) for _ in range(30)]
    first = [{"id": f"a{i}", "text": " ".join(words)} for i, words in enumerate(base)]
    first.append({"id": "a-copy", "text": first[3]["text"]})
    second = [{"id": f"b{i}", "text": " ".join(with_changes(source, base[i], 1)) + " longer"} for i in range(10)]
    second += [
        {"id": "b-copy", "text": first[7]["text"]},
        {"id": "b-near-copy", "text": second[2]["text"]},
        {"id": "new", "text": " ".join(random_words(source, 40)), "blob": "x" * 4_200_000, "n": None},
        {"id": "short", "text": "only three words"},
        {"id": "short too", "text": "Only three, words!"},
        {"id": "no words", "text": "..."},
        {"id": "no words either", "text": "!!!"},
    ]
    return [write_jsonl(directory / "a.jsonl", first), write_jsonl(directory / "b.jsonl", second)]


@pytest.mark.fast
@pytest.mark.parametrize("keep", ["first", "longest"])
def test_which_document_is_kept_and_why_the_others_went(tmp_path: Path, keep: str) -> None:
    paths = corpus_with_copies(tmp_path)
    out = tmp_path / "out"
    summary = deduplicate(paths, out, keep=keep, keep_rejected=True)
    kept = read_shards(out)
    gone = {record["id"]: record for record in read_shards(out / "rejected")}
    untouched = {*(f"a{i}" for i in range(10, 30)), "new", "short", "no words", "no words either"}
    pairs = {*(f"a{i}" for i in range(10))} if keep == "first" else {*(f"b{i}" for i in range(10))}
    assert {record["id"] for record in kept} == untouched | pairs
    new = next(record for record in kept if record["id"] == "new")
    assert new["n"] is None and len(new["blob"]) == 4_200_000
    assert summary.removed == {"exact_duplicate": 3, "near_duplicate": 11, "contaminated": 0}
    a, b = paths
    assert gone["short too"]["duplicate_of"] == f"{b}:14"
    assert (gone["a-copy"]["rejected_by"], gone["b-copy"]["rejected_by"]) == ("exact_duplicate",) * 2
    assert gone["a-copy"]["duplicate_of"] == (f"{a}:4" if keep == "first" else f"{b}:4")
    # the copy of a document that is itself dropped names the one that stays
    assert gone["b-near-copy"]["rejected_by"] == "exact_duplicate"
    assert gone["b-near-copy"]["duplicate_of"] == (f"{a}:3" if keep == "first" else f"{b}:3")
    assert gone["b0" if keep == "first" else "a0"]["rejected_by"] == "near_duplicate"


def test_output_does_not_depend_on_workers_or_memory(tmp_path: Path) -> None:
    paths = corpus_with_copies(tmp_path)
    one = run_tool("--input", *paths, "--output", tmp_path / "one", "--workers", 1, "--keep-rejected")
    assert one.returncode == 0, one.stderr
    deduplicate(paths, tmp_path / "three", workers=3, memory=3000, keep_rejected=True)
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.zst"))
    assert names == [
        "00000_a.jsonl.zst",
        "00001_b.jsonl.zst",
        *(f"rejected/0000{i}_{c}.jsonl.zst" for i, c in enumerate("ab")),
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    report = orjson.loads((tmp_path / "one" / "report.json").read_bytes())
    assert report["removed"] == {"exact_duplicate": 3, "near_duplicate": 11, "contaminated": 0}
    assert report["documents"] == report["kept"] + 14 == 48
    assert report["cluster_sizes"] == {"2": 11}
    assert sum(report["similarity_histogram"]) == report["compared_pairs"]
    assert (tmp_path / "one" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "near duplicate" in one.stdout
    assert sorted(os.listdir(tmp_path / "one" / ".progress")) == ["run.json"], "work files were left"
    again = run_tool("--input", *paths, "--output", tmp_path / "one", "--keep-rejected")
    assert again.returncode == 0 and "finished already" in again.stdout
    other = run_tool("--input", *paths, "--output", tmp_path / "one", "--threshold", 0.7)
    assert other.returncode == 2 and "made from other input or settings" in other.stderr


@pytest.mark.fast
def test_decontamination_removes_and_names_the_item(tmp_path: Path) -> None:
    source = random.Random(8)
    secret = random_words(source, 30)
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"q": "tiny"}, {"q": " ".join(secret)}])
    texts = [random_words(source, 60) for _ in range(20)]
    texts[6][10:23] = [word.upper() for word in secret[5:18]]  # 13 words
    texts[7][10:22] = secret[5:17]  # 12 words
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": i, "text": ", ".join(words)} for i, words in enumerate(texts)])
    out = tmp_path / "out"
    summary = deduplicate([corpus], out, decontaminate=(str(bench),), decontaminate_key="q", keep_rejected=True)
    assert {record["id"] for record in read_shards(out)} == {*range(20)} - {6}
    (gone,) = read_shards(out / "rejected")
    assert (gone["id"], gone["rejected_by"], gone["contaminated_by"]) == (6, "contaminated", f"{bench}:2")
    assert (summary.removed["contaminated"], summary.benchmark_items_too_short) == (1, 1)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 at growing times into the run, then the same command again, until it finishes."""
    paths = corpus_with_copies(tmp_path)
    source = random.Random(5)
    for number in range(3):
        records = [{"text": " ".join(random_words(source, 100)), "blob": "x" * 500_000} for _ in range(9)]
        paths.append(write_jsonl(tmp_path / f"more{number}.jsonl", records))
    deduplicate(paths, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, str(TOOL), "--input", *map(str, paths), "--output", str(out), "--workers", "1"]
    kills = 0
    for attempt in range(40):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                _, errors = process.communicate(timeout=0.4 + 0.3 * attempt)
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert kills > 0
    shards = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.zst")}
    assert len(shards) == 5
    assert {path.name: path.read_bytes() for path in out.glob("*.zst")} == shards
    assert not list(out.rglob("*.partial")), "a killed run's half-written files were left"


def test_input_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    paths = corpus_with_copies(tmp_path)
    settings = Settings(threshold=0.8, banding=choose_banding(0.8))
    task = Deduplication(paths, tmp_path / "out", settings, 1, 1 << 28)
    sketch = task._sketch

    def cut_first(copies: Any) -> Any:
        paths[0].write_bytes(b"\n".join(paths[0].read_bytes().splitlines()[:-1]) + b"\n")
        return sketch(copies)

    task._sketch = cut_first  # type: ignore[method-assign]
    with pytest.raises(UserError, match="changed while it was read"):
        task.run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "2"], "--threshold 2.0 must be above 0"),
        (["--bands", "4"], "--bands and --rows go together"),
        (["--workers", "0"], "--workers: '0' is not a whole number from 1"),
        (["--key", "body"], "missing key"),
        (["--decontaminate", "nowhere*.jsonl"], "nowhere*.jsonl"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "some words"}])
    done = run_tool("--input", corpus, "--output", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_truncated_file_fails_unless_allowed(tmp_path: Path) -> None:

    whole = gzip.compress(b"".join(orjson.dumps({"text": f"text {i}"}) + b"\n" for i in range(3000)))
    corpus = tmp_path / "c.jsonl.gz"
    corpus.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged input .* --allow-damaged"):
        deduplicate([corpus], tmp_path / "strict")
    summary = deduplicate([corpus], tmp_path / "lenient", allow_damaged=True)
    assert 0 < summary.documents < 3000


def test_start_up_is_quick_and_without_torch() -> None:
    code = f"import sys; sys.argv = ['dedup', '--help']; import runpy\n\
try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n\
except SystemExit: pass\n\
assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 1


ENDLESS_WORK = """
import runpy, sys, time
from megalite.text.dedup import deduplication
deduplication.digest_unit = lambda task: time.sleep(3600)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    """No process that has the output directory on its command line or open is left behind."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "x " * 3_000_000}]) for name in "abc"]
    arguments = ["--input", *map(str, paths), "--output", str(tmp_path / "out"), "--workers", "2"]
    command = [sys.executable, "-c", ENDLESS_WORK, str(TOOL), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        known = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: len(known.read_text().split()) == 2, process)
        children = known.read_text().split()
        process.kill()
    wait_until(lambda: not any(map(is_running, children)), told=lambda: children)

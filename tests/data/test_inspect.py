"""The programs `inspect_data.py` and `merge_data.py`, as a user runs them."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.inspection import histogram_lines, statistics
from tests.support.patience import PATIENCE_SECONDS

TOOLS = Path(__file__).resolve().parents[2] / "tools"
pytestmark = pytest.mark.fast


def run(folder, tool, *arguments):
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def write(prefix, documents, dtype=np.uint16, **provenance):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish(provenance)
    return IndexedDataset(prefix)


@pytest.fixture
def folder(tmp_path):
    for name, count, salt in (("a", 60, 1), ("b", 25, 5)):
        write(tmp_path / name, [[(i * 7 + j + salt) % 256 for j in range(1 + i * 5 % 23)] for i in range(count)])
    return tmp_path


def test_order_of_one_file_is_that_of_its_definition(folder):
    done = run(folder, "inspect_data.py", "a", "--order", "--seq-length", 16, "--samples", 20, "--seed", 42)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # one epoch, so the arrays can be told from their definition with nothing of megalite's
    lengths = [1 + i * 5 % 23 for i in range(60)]
    assert sum(lengths) > 20 * 16
    random = np.random.RandomState(42)
    documents = np.arange(60, dtype=np.int32)
    random.shuffle(documents)
    ends = np.cumsum([lengths[number] for number in documents])
    rows = []
    for start in range(0, ends[-1], 16):
        position = int(np.searchsorted(ends, start, side="right"))
        rows.append((position, start - (ends[position] - lengths[documents[position]])))
    shuffle = np.arange(len(rows) - 1, dtype=np.uint32)
    random.shuffle(shuffle)
    for name, array in (
        ("document_index", documents.astype("<i4")),
        ("sample_index", np.array(rows, "<i4")),
        ("shuffle_index", shuffle.astype("<u4")),
    ):
        assert result[name] == hashlib.sha256(array.tobytes()).hexdigest(), name
    stream = np.concatenate([[(i * 7 + j + 1) % 256 for j in range(lengths[i])] for i in documents])
    start = int(shuffle[0]) * 16
    assert result["tokens"] == stream[start : start + 16].tolist()
    assert result["labels"] == stream[start + 1 : start + 17].tolist()
    assert "blend" not in result


def test_order_of_a_blend(folder):
    common = ("--order", "--seq-length", 8, "--samples", 40, "--seed", 3)
    result = json.loads(run(folder, "inspect_data.py", "a", "b", *common, "--weights", 3, 1).stdout)
    chosen, taken, counts = [], [], [0, 0]
    for sample in range(40):
        behind = [weight * max(sample, 1) - count for weight, count in zip((0.75, 0.25), counts)]
        pick = behind.index(max(behind))
        chosen.append(pick)
        taken.append(counts[pick])
        counts[pick] += 1
    expected = np.array(chosen, "<i2").tobytes() + np.array(taken, "<i8").tobytes()
    assert result["blend"] == hashlib.sha256(expected).hexdigest()
    for file, samples in zip(result["files"], (31, 11)):  # its share of 40, and 0.5 % more to draw from
        size = ("--order", "--seq-length", 8, "--samples", samples, "--seed", 3)
        alone = json.loads(run(folder, "inspect_data.py", file["prefix"], *size).stdout)
        assert all(alone[key] == file[key] for key in ("document_index", "sample_index", "shuffle_index"))
    unweighted = json.loads(run(folder, "inspect_data.py", "a", "b", *common).stdout)
    assert unweighted["blend"] != result["blend"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--order", "--samples", "5"], "--order needs --seq-length and --samples"),
        (["a", "--order", "--samples", "0", "--seq-length", "4"], "--samples 0: must be at least 1"),
        (["a", "b", "--order", "--samples", "5", "--seq-length", "4", "--weights", "1"], "1 weights for 2 prefixes"),
        (["a", "--order", "--samples", "5", "--seq-length", "4", "--seed", "-1"], "--seed -1: must be from 0"),
        (["missing"], "missing.idx: no such file"),
        (["a", "--first-document", "61"], "a has 60 documents"),
        (["a", "--verify", "--vocab-size", "200"], "is outside the vocabulary of 200"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOLS / "inspect_data.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_documents_are_decoded_and_verified(tmp_path):
    texts = ["Grüße, Welt", "zweites Dokument", "drittes"]
    tokenizer = {"kind": "byte", "files": [], "sha256": "ab" * 32, "vocab_size": 257}
    write(tmp_path / "t", [[*text.encode(), 256] for text in texts], tokenizer=tokenizer)
    assert "ids below 257" in run(tmp_path, "inspect_data.py", "t", "--verify").stdout  # from what is noted beside it
    done = run(tmp_path, "inspect_data.py", "t", "--tokenizer-model", "byte", "--documents", 2, "--verify")
    assert done.returncode == 0, done.stderr
    assert texts[0] in done.stdout and texts[1] in done.stdout and texts[2] not in done.stdout
    assert "ids below 257, checksums agree" in done.stdout


def test_verify_finds_a_changed_byte(folder):
    data = bytearray((folder / "a.bin").read_bytes())
    data[100] ^= 1
    (folder / "a.bin").write_bytes(data)
    done = run(folder, "inspect_data.py", "a", "--verify")
    assert done.returncode == 2 and "a.bin: sha256" in done.stderr


def test_statistics_count_every_length(tmp_path):
    lengths = [1, 1, 2, 3, 4, 7, 8, 1023, 1024]
    dataset = write(tmp_path / "s", [np.ones(length, np.int64) for length in lengths] + [[], []])
    found = statistics(dataset)
    assert (found.documents, found.empty_documents, found.sequences, found.tokens) == (11, 2, 9, sum(lengths))
    assert found.histogram == (2, 2, 2, 1, 0, 0, 0, 0, 0, 1, 1)
    assert found.percentiles[0] == 1 and found.percentiles[2] == 4 and found.percentiles[-1] == 1024
    lines = histogram_lines(found.histogram)
    assert len(lines) == 11 and lines[0].count("█") == 2 * lines[3].count("█") == 50


def test_statistics_as_json(folder):
    done = run(folder, "inspect_data.py", "a", "b", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["documents"], second["documents"]) == (60, 25)
    assert first["fingerprint"] == IndexedDataset(folder / "a").fingerprint()


def test_merge_keeps_the_order_of_the_arguments(folder):
    done = run(folder, "merge_data.py", "--input", "b", "a", "--output-prefix", "all")
    assert done.returncode == 0 and "85 documents" in done.stdout, done.stderr
    merged, first, second = (IndexedDataset(folder / name) for name in ("all", "b", "a"))
    np.testing.assert_array_equal(merged.tokens, np.concatenate((first.tokens, second.tokens)))
    assert [entry["name"] for entry in merged.description()["merged_from"]] == ["b", "a"]
    assert run(folder, "inspect_data.py", "all", "--verify").returncode == 0


def test_merge_refuses_other_dtypes_and_other_tokenizers(folder):
    write(folder / "wide", [[1, 2]], np.int32)
    write(folder / "one", [[1, 2]], tokenizer={"sha256": "1" * 64})
    write(folder / "two", [[1, 2]], tokenizer={"sha256": "2" * 64})
    for inputs, message in ((("a", "wide"), "token dtype int32"), (("one", "two"), "another tokenizer than one")):
        done = run(folder, "merge_data.py", "--input", *inputs, "--output-prefix", "out")
        assert done.returncode == 2 and message in done.stderr
        assert not list(folder.glob("out*"))


def test_programs_do_without_torch():
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path(%r, run_name='__main__')\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    for tool in ("inspect_data.py", "merge_data.py"):
        done = subprocess.run(
            [sys.executable, "-c", code % str(TOOLS / tool)], capture_output=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, tool

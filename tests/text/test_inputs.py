"""Which files a name, a glob or a directory stands for: each once, whatever links there are; every walk ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.errors import UserError
from megalite.text.input_files import expand_inputs

pytestmark = pytest.mark.fast


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """`a.jsonl` and `sub/b.txt` below a directory of their own."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (folder / "sub" / "b.txt").write_text("two")
    return folder


def names(folder: Path, *patterns: object) -> list[str]:
    return [os.path.relpath(path, folder) for path in expand_inputs([str(pattern) for pattern in patterns])]


def test_links_to_parents_end_there(corpus: Path) -> None:
    for name in ("x", "y", "sub/z"):
        (corpus / name).symlink_to(corpus)
    (corpus / "sub" / "self").symlink_to(".")
    assert names(corpus, corpus) == ["a.jsonl", "sub/b.txt"]
    assert names(corpus, corpus / "**/*.txt") == names(corpus, corpus / "**" / "**" / "b*") == ["sub/b.txt"]


def test_many_paths_to_one_directory_are_one_walk(corpus: Path) -> None:
    """2^40 paths lead to the last directory."""
    here = corpus
    for _ in range(40):
        (here / "deep").mkdir()
        (here / "again").symlink_to("deep")
        here = here / "deep"
    (here / "c.txt").write_text("three")
    assert len(names(corpus, corpus)) == 3
    assert len(names(corpus, corpus / "**/c.txt")) == 1


def test_one_file_of_several_names_is_read_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(corpus / "a.jsonl", corpus / "hard.jsonl")
    (corpus / "soft.jsonl").symlink_to("a.jsonl")
    (tmp_path / "other").symlink_to(corpus)
    monkeypatch.chdir(corpus)
    assert names(corpus, corpus) == ["a.jsonl", "sub/b.txt"]
    assert names(corpus, "a.jsonl", "./a.jsonl", corpus / "sub" / ".." / "a.jsonl", tmp_path / "other") == [
        "a.jsonl",
        os.path.relpath(tmp_path / "other" / "sub" / "b.txt", corpus),
    ]


@pytest.mark.parametrize("snapshots", ["snapshots", "elsewhere"])
def test_a_hugging_face_cache_gives_each_file_once_and_by_its_own_name(tmp_path: Path, snapshots: str) -> None:
    for part in ("blobs", f"{snapshots}/1", f"{snapshots}/2", "refs"):
        (tmp_path / part).mkdir(parents=True)
    for number, blob in enumerate(("0f", "1e")):
        (tmp_path / "blobs" / blob).write_text(f'{{"text": "{number}"}}\n')
    for revision, name, blob in ((1, "train.jsonl", "0f"), (2, "train.jsonl", "0f"), (2, "more.jsonl", "1e")):
        (tmp_path / snapshots / str(revision) / name).symlink_to(f"../../blobs/{blob}")
    found = names(tmp_path, tmp_path)
    assert sorted(found) == [f"{snapshots}/1/train.jsonl", f"{snapshots}/2/more.jsonl"]


def test_hidden_files_are_left_out_and_dots_in_globs_are_followed(corpus: Path) -> None:
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "h.txt").write_text("h")
    (corpus / ".h.txt").write_text("h")
    assert names(corpus, corpus) == names(corpus, corpus / "**") == ["a.jsonl", "sub/b.txt"]
    assert names(corpus, corpus / ".h*/*") == [".hidden/h.txt"]
    assert names(corpus, corpus / ".*.txt") == [".h.txt"]


def test_what_is_no_file_is_refused_by_name(corpus: Path) -> None:
    os.mkfifo(corpus / "pipe")
    (corpus / "sub" / "gone.jsonl").symlink_to("nowhere")
    for given, message in (
        (corpus / "pipe", "pipe: is a pipe, and only files can be read; write it to a file first"),
        ("/dev/zero", "/dev/zero: is a device"),
        (corpus / "sub", "gone.jsonl: is a link to a file that is not there"),
        (corpus / "sub" / "g*", "gone.jsonl: is a link to a file that is not there"),
        (corpus / "none", "none: matches no file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            expand_inputs([str(given)], "--decontaminate")
        assert str(caught.value).startswith("--decontaminate ")
    (corpus / os.fsdecode(b"\xff.txt")).write_text("x")
    with pytest.raises(UserError, match=r"xff.txt': the name is not UTF-8"):
        expand_inputs([corpus / "*.txt"])


def test_standard_input_is_read_where_it_is_a_file(tmp_path: Path) -> None:
    """By the file's own name: a worker's standard input is another one. Its JSON lines are told by what they are."""
    lines = tmp_path / "part-00000"
    lines.write_text('{"text": "ab"}\n' * 3)
    (tmp_path / "b.txt").write_text("x")
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", "/dev/stdin", str(tmp_path / "b.txt"), "--tokenizer-type", "byte"]
    command += ["--output-prefix", str(tmp_path / "p")]
    with open(lines) as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert "4 documents, 7 tokens" in done.stdout, done.stderr
    piped = subprocess.run(command, input=lines.read_text(), capture_output=True, text=True)
    assert piped.returncode == 2 and piped.stderr.startswith("error: --input /dev/stdin: is a pipe")

import contextlib
import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError
from megalite.text import preprocess_shard
from megalite.text.preprocess import PreprocessOptions, preprocess
from megalite.text.preprocess_shard import plan_shards
from tests.support.patience import PATIENCE_SECONDS

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


def tool(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)))


def outputs(prefix: Path) -> dict[str, bytes]:
    return {part: Path(f"{prefix}_text_document.{part}").read_bytes() for part in ("bin", "idx", "json")}


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Many shards of little text; workers are forked, so they see it, too."""
    monkeypatch.setattr(preprocess_shard, "SMALLEST_SHARD", 3000)
    monkeypatch.setattr(preprocess_shard, "BATCH_DOCUMENTS", 4)


@pytest.fixture
def texts(chance: random.Random, source_texts: list[str]) -> list[str]:
    source = "".join(source_texts)
    starts = [chance.randrange(len(source)) for _ in range(chance.randrange(150, 250))]
    return [source[start : start + chance.randrange(1, 900)] for start in starts]


@pytest.mark.fast
@pytest.mark.parametrize("append_eod", [False, True])
def test_files_are_those_of_the_format_byte_for_byte(
    tmp_path, texts, model_path, small_shards, append_eod, chance
) -> None:
    """Megatron's layout written down once more, from one plain loop over sentencepiece."""
    middle = chance.randrange(len(texts))
    write_jsonl(tmp_path / "a.jsonl", texts[:middle])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[middle]}).encode()))
    write_jsonl(tmp_path / "c.jsonl", texts[middle + 1 :])
    [summary] = preprocess(
        PreprocessOptions([f"{tmp_path}/*.jsonl*"], str(tmp_path / "p"), str(model_path), append_eod=append_eod),
        show_progress=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    documents = [model.encode(text) + [model.eos_id()] * append_eod for text in texts]
    lengths = np.array([len(ids) for ids in documents])
    expected = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08"
    expected += np.array([len(documents), len(documents) + 1], "<u8").tobytes() + lengths.astype("<i4").tobytes()
    expected += (2 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes()
    expected += np.arange(len(documents) + 1, dtype="<i8").tobytes()
    made = outputs(tmp_path / "p")
    assert made["idx"] == expected
    assert made["bin"] == np.concatenate(documents).astype("<u2").tobytes()
    facts = json.loads(made["json"])
    assert facts == summary.description
    assert facts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert facts["tokens"] == lengths.sum() and facts["documents"] == facts["records"] == len(texts)
    assert [Path(entry["file"]).name for entry in facts["inputs"]] == ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    assert summary.shards > 5
    assert sorted(path.name for path in tmp_path.glob("p*")) == [f"p_text_document.{e}" for e in ("bin", "idx", "json")]


def test_number_of_workers_changes_no_byte(tmp_path, texts, small_shards) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    made = []
    for workers in (1, 2, 5):
        options = PreprocessOptions(
            [str(tmp_path / "a.jsonl")], str(tmp_path / str(workers)), tokenizer_type="byte", workers=workers
        )
        preprocess(options, show_progress=False)
        made.append(outputs(tmp_path / str(workers)))
    assert made[0] == made[1] == made[2]
    assert b"".join(text.encode() for text in texts) == np.frombuffer(made[0]["bin"], "<u2").astype(np.uint8).tobytes()


def test_shards_cover_the_input_and_follow_from_it_alone(tmp_path, chance, monkeypatch) -> None:
    monkeypatch.setattr(preprocess_shard, "SMALLEST_SHARD", 100)
    paths = []
    for number in range(30):
        path = tmp_path / f"{number}.{chance.choice(['jsonl', 'txt', 'jsonl.gz'])}"
        path.write_bytes(bytes(chance.choice([0, 30, chance.randrange(900)])))
        paths.append(path)
    shards = [unit.pieces for unit in plan_shards(paths)]
    pieces = [piece for shard in shards for piece in shard]
    assert sum(piece.end - piece.start for piece in pieces) == sum(path.stat().st_size for path in paths)
    for path in paths:
        mine = [piece for piece in pieces if piece.path == str(path)]
        assert mine[0].start == 0
        assert all(a.end == b.start for a, b in itertools.pairwise(mine))
        assert mine[-1].end == path.stat().st_size
    assert len(shards) > 10 and max(len(shard) for shard in shards) > 1


BAD_ROWS = [
    b'{"text": "a\xff"}',
    b'{"text": "a',
    b'{"body": "x"}',
    b'{"text": 3}',
    b"[]",
    b'{"text": "\\ud800"}',
    b'{"text": ' + b"[" * 3000,
]


@pytest.mark.fast
def test_bad_records_are_counted_and_kept_with_their_lines(tmp_path, small_shards, chance) -> None:
    rows = [b'{"text": "%s"}' % (b"ok " * chance.randrange(1, 60)) for _ in range(300)]
    bad_lines = sorted(chance.sample(range(1, 301), len(BAD_ROWS) + 1))
    for line, row in zip(bad_lines, [*BAD_ROWS, b'{"text": ""}'], strict=True):
        rows[line - 1] = row
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    options = PreprocessOptions([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), tokenizer_type="byte", workers=2)
    [summary] = preprocess(options, show_progress=False)
    assert summary.shards > 3  # so that lines are counted across shards
    kept = [json.loads(row) for row in (tmp_path / "p_text_document.bad.jsonl").read_text().splitlines()]
    assert [row["line"] for row in kept] == bad_lines[:-1]
    assert kept[2]["raw"] == BAD_ROWS[2].decode() and "raw_base64" in kept[0]
    facts = summary.description
    assert facts["bad_records"] == {
        "broken JSON": 2,
        "invalid UTF-8": 1,
        "lone surrogate": 1,
        "missing key": 1,
        "not a JSON object": 1,
        "not text": 1,
    }
    assert facts["skipped_empty"] == 1 and facts["documents"] == 300 - len(bad_lines) and facts["records"] == 300
    with pytest.raises(UserError, match=rf"7 of 300 records .*a\.jsonl:{bad_lines[0]}: invalid UTF-8"):
        preprocess(PreprocessOptions(**{**vars(options), "max_bad_ratio": 0.02}), show_progress=False)


def test_wrong_key_stops_early_and_names_the_fields(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"] * 1500)
    done = subprocess.run(
        tool(
            *("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", "--tokenizer-type", "byte"),
            *("--json-keys", "content"),
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no field 'content'; fields there: 'text', 'id'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.idx"))


def test_damaged_file_fails_unless_allowed(tmp_path, texts) -> None:
    data = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts * 5).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    options = {"input": [str(tmp_path / "a.jsonl.gz")], "output_prefix": str(tmp_path / "p"), "tokenizer_type": "byte"}
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: damaged file.*--allow-damaged"):
        preprocess(PreprocessOptions(**options), show_progress=False)
    assert not Path(tmp_path / "p_text_document.idx").exists()
    [summary] = preprocess(PreprocessOptions(**options, allow_damaged=True), show_progress=False)
    assert summary.description["documents"] > 10 and summary.resumed_shards == summary.shards == 1


def test_empty_texts_are_skipped_or_kept_without_tokens(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", "ab", "", "c"])
    options = {"input": [str(tmp_path / "a.jsonl")], "tokenizer_type": "byte", "append_eod": True}
    preprocess(PreprocessOptions(output_prefix=str(tmp_path / "p"), **options), show_progress=False)
    preprocess(PreprocessOptions(output_prefix=str(tmp_path / "q"), keep_empty=True, **options), show_progress=False)
    skipped, kept = (IndexedDataset(f"{tmp_path}/{name}_text_document") for name in "pq")
    assert skipped.tokens.tolist() == kept.tokens.tolist() == [97, 98, 256, 99, 256]
    assert skipped.boundaries.tolist() == [0, 1, 2] and kept.boundaries.tolist() == [0, 0, 1, 1, 2]
    write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="no document with text in 1 files"):
        preprocess(PreprocessOptions(output_prefix=str(tmp_path / "r"), **options), show_progress=False)


def test_special_tokens_in_texts_are_text_unless_allowed(tmp_path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b<|endoftext|>", "plain"])
    for allowed, ends in (([], 2), (["--allow-special"], 4)):
        arguments = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p", "--append-eod", *allowed]
        arguments += ["--tokenizer-model", tmp_path / "tokenizer.json"]
        done = subprocess.run(tool(*arguments), capture_output=True, text=True, check=True)
        dataset = IndexedDataset(tmp_path / "p_text_document")
        assert sum(int((dataset[number] == 256).sum()) for number in range(2)) == ends
        description = json.loads((tmp_path / "p_text_document.json").read_text())
        assert description["special_in_text"] == 2 and description["allow_special"] == bool(allowed)
        assert "special tokens: 2 stood in the texts and" in done.stdout
    with pytest.raises(UserError, match="--allow-special: byte tokenizers never make special tokens of text"):
        preprocess(PreprocessOptions(["x"], "p", tokenizer_type="byte", allow_special=True))


def test_each_key_has_its_own_output(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab", "title": "T"}\n')
    options = PreprocessOptions(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "p"), tokenizer_type="byte", json_keys=("text", "title")
    )
    assert [summary.description["tokens"] for summary in preprocess(options, show_progress=False)] == [2, 1]
    assert IndexedDataset(tmp_path / "p_title_document").tokens.tolist() == [84]


def test_giant_document_has_the_ids_of_the_whole(tmp_path, source_texts, model_path) -> None:
    giant = "\n".join(source_texts) * 2 + "x" * 5000
    (tmp_path / "a.txt").write_text(giant, newline="")
    preprocess(PreprocessOptions([str(tmp_path / "a.txt")], str(tmp_path / "p"), str(model_path)), show_progress=False)
    ids = sentencepiece.SentencePieceProcessor(model_file=str(model_path)).encode(giant)
    assert len(giant) > preprocess_shard.BATCH_CHARACTERS
    assert IndexedDataset(tmp_path / "p_text_document")[0].tolist() == ids


def test_id_beyond_the_vocabulary_is_refused(tmp_path, monkeypatch) -> None:
    from megalite.text.tokenizers import ByteTokenizer

    write_jsonl(tmp_path / "a.jsonl", ["ab"])
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda self, texts: [np.array([70000], np.int32)] * len(texts))
    with pytest.raises(UserError, match="id 70000"):
        preprocess(PreprocessOptions([str(tmp_path / "a.jsonl")], str(tmp_path / "p"), tokenizer_type="byte"), False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"max_bad_ratio": 2.0}, "--max-bad-ratio 2"),
        ({"json_keys": ("text", "text")}, "--json-keys"),
        ({"tokenizer_type": None}, "--tokenizer-model is missing"),
        ({"input": ["none/*.jsonl"]}, r"none/\*.jsonl: matches no file"),
        ({"output_prefix": "/proc/p"}, "cannot be written"),
    ],
)
def test_unusable_options_are_named(tmp_path, change, words) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["ab"])
    options = {"input": [str(tmp_path / "a.jsonl")], "output_prefix": str(tmp_path / "p"), "tokenizer_type": "byte"}
    with pytest.raises(UserError, match=words):
        preprocess(PreprocessOptions(**{**options, **change}), show_progress=False)


@pytest.fixture
def slow_job(tmp_path, source_texts) -> tuple[Path, list[str]]:
    """A corpus whose processing takes seconds, and the command without its output."""
    write_jsonl(tmp_path / "a.jsonl", ["\n".join(source_texts[n : n + 3]) for n in range(57)] * 4)
    return tmp_path, ["--input", str(tmp_path / "a.jsonl"), "--workers", "2", "--append-eod"]


def written_since(folder, moment: float) -> bool:
    """Whether a file of the folder has been written to after `moment`, in seconds since the epoch."""
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > moment:
                return True
    return False


@pytest.mark.slow
def test_killed_at_random_and_resumed_gives_the_same_bytes(slow_job, model_path, chance) -> None:
    folder, arguments = slow_job
    arguments += ["--tokenizer-model", str(model_path)]
    start = time.monotonic()
    subprocess.run(tool(*arguments, "--output-prefix", folder / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - start
    kills = 0
    for attempt in range(40):
        sent = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process = subprocess.Popen(
            tool(*arguments, "--output-prefix", folder / "cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        begun = time.time()
        while process.poll() is None and not written_since(folder / "cut_text_document.parts", begun):
            time.sleep(0.01)  # an interrupt while Python itself starts is Python's affair
        try:
            process.wait(timeout=chance.uniform(0.0, 0.5) * seconds if attempt < 8 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
            ended = process.wait(timeout=PATIENCE_SECONDS)
            assert ended in (130 if sent == signal.SIGINT else -sent, 0)  # 0: it was just done
            kills += ended != 0
        if process.returncode == 0:
            break
        assert not (folder / "cut_text_document.idx").exists() or kills
    assert process.returncode == 0 and kills > 0
    assert outputs(folder / "cut") == outputs(folder / "whole")
    assert not list(folder.glob("cut*tmp")) and not (folder / "cut_text_document.parts").exists()


@pytest.mark.slow
def test_resume_uses_finished_shards_only_for_the_same_job(slow_job, texts, small_shards) -> None:
    folder, _ = slow_job
    write_jsonl(folder / "b.jsonl", texts)
    options = {"input": [str(folder / "b.jsonl")], "output_prefix": str(folder / "p"), "tokenizer_type": "byte"}
    preprocess(PreprocessOptions(**{**options, "output_prefix": str(folder / "whole")}), show_progress=False)
    with open(folder / "b.jsonl", "r+b") as file:  # the last record becomes unusable: the job fails at its end
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(UserError, match="--max-bad-ratio"):
        preprocess(PreprocessOptions(**options, max_bad_ratio=0), show_progress=False)
    [summary] = preprocess(PreprocessOptions(**options, max_bad_ratio=0.5), show_progress=False)
    assert summary.resumed_shards == summary.shards > 5
    with pytest.raises(UserError, match="--max-bad-ratio"):
        preprocess(PreprocessOptions(**options, max_bad_ratio=0), show_progress=False)
    write_jsonl(folder / "b.jsonl", texts)  # mended: nothing made from the old file may be used
    [summary] = preprocess(PreprocessOptions(**options), show_progress=False)
    assert summary.resumed_shards == 0
    assert outputs(folder / "p")["bin"] == outputs(folder / "whole")["bin"]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_refused_write_is_one_line(tmp_path, texts, small_shards, workers) -> None:
    """A file-size limit in the shards, in a worker's process and in this one."""
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = PreprocessOptions([f"{tmp_path}/a.jsonl"], f"{tmp_path}/p", tokenizer_type="byte", workers=workers)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(UserError, match=r"\.(bin|idx) cannot be written: File too large$"):
            preprocess(options, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_full_disk_is_told_and_the_job_goes_on_with_more_room(slow_job, model_path) -> None:
    folder, arguments = slow_job
    arguments += ["--tokenizer-model", str(model_path)]
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        done = subprocess.run(tool(*arguments, "--output-prefix", disk / "p"), capture_output=True, text=True)
        assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
        assert not list(disk.glob("*.bin")) and not list(disk.glob("*.idx"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        subprocess.run(tool(*arguments, "--output-prefix", disk / "p"), check=True, capture_output=True)
        subprocess.run(tool(*arguments, "--output-prefix", folder / "whole"), check=True, capture_output=True)
        assert outputs(disk / "p") == outputs(folder / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_tools_start_without_torch() -> None:
    modules = "megalite.text.preprocess, megalite.text.tokenizer_training, megalite.text.huggingface_tokenizer"
    code = f"import sys, tyro, {modules}; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_texts_need_neither_templates_nor_the_library_of_another_tokenizer(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    code = (
        "import sys; from megalite.text.preprocess import PreprocessOptions, preprocess\n"
        "from megalite.text.leading import leading_ids; from megalite.text.tokenizers import ByteTokenizer\n"
        "preprocess(PreprocessOptions(sys.argv[1:2], sys.argv[2], tokenizer_type='byte'))\n"
        "print(leading_ids(ByteTokenizer()), 'jinja2' in sys.modules, 'tokenizers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "() False False"

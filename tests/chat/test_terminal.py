"""`tools/chat.py` in the terminal, as a user runs it, with standard input from a file."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite.generation.generator import Generator, Limits
from megalite.generation.loading import load_model, open_checkpoint
from megalite.generation.sampling import Sampling
from tests.fixtures import golden
from tests.support.talker import TEMPLATE, make_talker

CHAT = Path(__file__).parents[2] / "tools" / "chat.py"
Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("chat") / "talker", TEMPLATE)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Say these lines: exit code, standard output, standard error."""

    def call(lines: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code: Any = 0
        try:
            runpy.run_path(str(CHAT), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        output = capsys.readouterr()
        return int(code or 0), output.out, output.err

    return call


def _answers(talker: Path, conversation: list[dict[str, str]], questions: list[str], new: int) -> list[str]:
    """What the model says, greedy, each turn computed anew."""
    answers = []
    with (
        open_checkpoint(talker) as opened,
        load_model(opened, ()) as loaded,
        loaded.model.generating() as stages,
    ):
        generator = Generator(stages, loaded.model.owners, loaded.mesh, loaded.config.model)
        for question in questions:
            conversation = [*conversation, {"role": "user", "content": question}]
            ids = opened.chat_template().ids(conversation, add_generation_prompt=True)
            limits = Limits(new, frozenset(opened.eos), opened.chat_template().stop_strings)
            (row,) = generator.run([ids], Sampling(0), limits, opened.tokenizer)
            answers.append(row.text + (" (cut off)" if row.reason == "length" else ""))
            conversation = [*conversation, {"role": "assistant", "content": row.text}]
    return answers


@pytest.mark.fast
def test_a_conversation(chat: Chat, talker: Path) -> None:
    """Several turns with what the model was told before them; a new conversation forgets."""
    options = ("--checkpoint", talker, "--temperature", 0, "--max-new-tokens", 12)
    told = [{"role": "system", "content": "be nice"}]
    first, second = _answers(talker, told, ["hello you", "and?"], 12)
    code, out, err = chat("hello you\n\nand?\n/reset\nhello you\n/exit\nnot read\n", *options, "--system", "be nice")
    assert (code, err) == (0, "")
    assert out == f"{first}\n{second}\nA new conversation begins.\n{first}\n"
    (plain,) = _answers(talker, [], ["hello you"], 12)
    assert chat("hello you\n", *options) == (0, f"{plain}\n", "")
    assert plain != first
    assert "/nope is not a command; there are /reset" in chat("/nope now\n", *options)[1]


@pytest.mark.fast
def test_the_oldest_turns_are_left_out(chat: Chat, talker: Path) -> None:
    """The model has 128 positions: at some time a conversation is too long, which is said once for each loss; a message
    that is too long alone is refused, and the conversation goes on."""
    options = ("--checkpoint", talker, "--temperature", 0, "--max-new-tokens", 12)
    lines = [f"a question of {number} x" for number in range(6)]
    code, out, err = chat("\n".join([*lines, "long " * 40, "short"]), *options)
    assert (code, err) == (0, "")
    notes = [line for line in out.splitlines() if line.startswith("(The conversation")]
    assert notes[0] == "(The conversation is too long for the model: the first 2 messages are left out.)"
    assert len(set(notes)) == len(notes) >= 2
    assert "error: the message is too long: " in out
    assert out.rstrip().splitlines()[-1] == "(cut off)" or out.rstrip().endswith("(cut off)")


@pytest.mark.fast
def test_the_seed_decides(chat: Chat, talker: Path) -> None:
    options = ("--checkpoint", talker, "--temperature", 1.5, "--max-new-tokens", 20)
    lines = "say it\n/reset\nsay it\n"
    answers = [chat(lines, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    before, after = answers[0].split("A new conversation begins.\n")
    assert before != after
    assert chat(lines, *options)[1] != chat(lines, *options)[1]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--checkpoint", golden.folder("mistral_swa")),
            "carries no tokenizer; a conversation needs one: give --tokeni",
        ),
        (("--checkpoint", "PLAIN"), "has no chat template; name a file, or chatml, the built-in one"),
        (("--checkpoint", "TALKER", "--chat-template", "/nowhere"), "chat template /nowhere: cannot be read"),
        (("--checkpoint", "TALKER", "--temperature", "-1"), "temperature = -1.0"),
        (("--checkpoint", "TALKER", "--seed", "-1"), "seed = -1"),
        (("--checkpoint", "TALKER", "--port", "70000"), "--port 70000 is above 65535"),
        (("--checkpoint", "TALKER", "--chat-template", "STRICT", "--system", "x"), "--system: the chat template"),
        (("--checkpoint", "TALKER", "--parallel.tensor", "2"), "1 process, but parallel.tensor"),
    ],
)
def test_mistakes_are_one_line(
    chat: Chat, talker: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    places = {
        "TALKER": talker,
        "PLAIN": make_talker(tmp_path / "plain"),
        "STRICT": tmp_path / "strict.jinja",
    }
    places["STRICT"].write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    code, out, err = chat("hello\n", *(places.get(str(argument), argument) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


@pytest.mark.slow
def test_under_torchrun(talker: Path) -> None:
    """Two tensor and two pipeline ranks answer as one process does; rank 0 alone reads and writes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(CHAT)]
    options = ["--checkpoint", str(talker), "--temperature", "0", "--max-new-tokens", "12"]
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    done = subprocess.run(
        [*torchrun, *options, *layout], input="hello\nand?\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{answer}\n" for answer in _answers(talker, [], ["hello", "and?"], 12))

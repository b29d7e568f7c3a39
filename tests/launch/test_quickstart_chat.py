"""The quickstart's conversations, rewards and scores, and one whole short run from text to a dialogue."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import quickstart_answers, quickstart_chat, stages
from launch import quickstart_conversations as conversations
from launch.recipes.quickstart_rewards import exact, is_right
from megalite.config import load_config
from megalite.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"


def solve(history: list[dict[str, str]]) -> str:
    """The answer to the last question, found again from what the user said alone."""
    said = [message["content"] for message in history if message["role"] == "user"]
    topics = [said[number] for number in range(len(said)) if ": " in said[number]]
    listed = topics[-1].partition("Here is a list: ")[2].partition(".")[0] if topics else ""
    text = topics[-1].partition("Here is a text: ")[2].partition(".")[0] + "." if topics else ""
    owner, colour, thing, place = (re.findall(r"(\w+) has a (\w+) (\w+) in the (\w+)[.]", text) or [("",) * 4])[0]
    question = re.split(r"(?<=[.]) (?=[A-Z])", said[-1])[-1]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if re.match(r"(What is \d+|And) (plus|minus) ", question):
        chain = " ".join(said).rpartition("What is ")[2]
        steps = re.findall(r"(plus|minus) (\d+)", chain)
        return str(int(chain.split()[0]) + sum(int(step) * (-1 if sign == "minus" else 1) for sign, step in steps))
    if question in ("And then?", "And smaller?"):
        before = [int(number) for number in re.findall(r"\d+", said[-2])]
        return str(before[0] + 2 if question == "And then?" else min(before))
    if question == "Say it again.":
        return f"It is {listed}." if listed else f"It says: {text}"
    if found := re.match(r"Is (\w+) in it", question):
        return "Yes." if found[1] in listed.split(", ") else "No."
    answers = {
        "Which number comes after": lambda: str(numbers[0] + 1),
        "Which number comes before": lambda: str(numbers[0] - 1),
        "Which is larger": lambda: str(max(numbers)),
        "Count from": lambda: ", ".join(map(str, range(numbers[0], numbers[1] + 1))),
        "Is ": lambda: "odd" if numbers[0] % 2 else "even",
        "Which is first": lambda: f"It is {listed.split(', ')[0]}.",
        "Which is second": lambda: f"It is {listed.split(', ')[1]}.",
        "Which is last": lambda: f"It is {listed.split(', ')[2]}.",
        f"What does {owner} have": lambda: f"It is a {colour} {thing}.",
        f"Who has the {thing}": lambda: f"It is {owner}.",
        f"What colour is the {thing}": lambda: f"It is {colour}.",
        f"Where is the {thing}": lambda: f"It is in the {place}.",
    }
    return next(answer for words, answer in answers.items() if question.startswith(words))()


@pytest.mark.fast
def test_every_answer_follows_from_what_was_said_before_it():
    seed = random.randrange(10**9)
    kinds = set()
    for record in conversations.prompts(seed, 400, kept=bool(seed % 2)):
        assert solve(record["prompt"]) == record["answer"]
        assert record["prompt"][-1]["role"] == "user"
        kinds.add(record["kind"])
    assert kinds == {"sum", "number", "list", "text"}
    hesitant = []
    for record in conversations.examples(seed, 200):
        said = record["messages"]
        assert [message["role"] for message in said] == ["user", "assistant"] * (len(said) // 2)
        for number in range(1, len(said), 2):
            answer = said[number]["content"]
            hesitant.append(answer.startswith(conversations.HESITATION))
            assert solve(said[:number]) == answer.removeprefix(f"{conversations.HESITATION} ")
    assert 0.4 < sum(hesitant) / len(hesitant) < 0.6


@pytest.mark.fast
def test_no_held_out_problem_is_trained_on_whatever_the_seeds():
    def problems(kept):
        seeds = (random.randrange(10**9) for _ in range(3))
        drawn = (conversations.conversation(seed, number, kept=kept) for seed in seeds for number in range(300))
        return {topic.problem for topics in drawn for topic in topics}

    trained, kept = problems(False), problems(True)
    assert not trained & kept
    sums = {problem for problem in kept if " plus " in problem or " minus " in problem}
    assert len(sums) >= 8 and len(kept) > len(sums)


@pytest.mark.fast
def test_the_data_is_a_function_of_seed_and_number(tmp_path):
    one, two = (list(conversations.examples(seed, 40)) for seed in (7, 8))
    assert one == list(conversations.examples(7, 50))[:40] and one != two
    conversations.write(tmp_path / "x.jsonl", iter(one))
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == one


@pytest.mark.fast
def test_only_the_right_answer_earns_all():
    answers = {
        "It is 12.": "It is 12.",
        " It is 12.\n": "It is 12.",
        "It is 1.": "It is 12.",
        "It is map, key.": "It is key, map.",
        "It is key, map. It is key, map.": "It is key, map.",
        "": "It is 3.",
        "Let me see. It is 4.": "It is 4.",
    }
    rewards = exact(prompts=[], completions=list(answers), completion_ids=[], answer=list(answers.values()), kind=[])
    assert rewards[:2] == [1.0, 1.0] and rewards[5:] == [0.0, 0.0]
    assert all(0 < reward <= 0.5 for reward in rewards[2:5])
    assert rewards[2] == pytest.approx(0.5 * 2 / 3) and rewards[4] == pytest.approx(0.25)
    assert not is_right("it is 12.", "It is 12.")
    with pytest.raises(ValueError):
        exact(completions=["a", "b"], answer=["a"])


@pytest.mark.fast
def test_scores_by_kind():
    records = [{"kind": kind, "answer": answer} for kind, answer in (("sum", "1"), ("sum", "2"), ("list", "x"))]
    share = pytest.approx(2 / 3, abs=1e-4)
    found = quickstart_answers.score(records, ["1", "Let me see. 2", "x"])
    assert found == {"accuracy": share, "of_kind": {"list": 1.0, "sum": 0.5}, "hesitant": 1.0, "questions": 3}
    shown = quickstart_chat.table({"pretrained": found, "grpo": found}).splitlines()
    assert shown[0].split() == ["right", "answers", "all", "list", "sum", "or", "hesitant"]
    assert shown[2].split() == ["grpo", "66.7%", "100.0%", "50.0%", "100.0%"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ('{"prompt": []}\n', "line 1: has no answer"),
        ("{", "cannot be read"),
        ("[1]\n", "line 1: is no record"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        quickstart_answers.read_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        quickstart_answers.read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="either --prompts FILE or --say"):
        quickstart_answers.parse(["--checkpoint", "x"])


@pytest.mark.fast
@pytest.mark.parametrize("stage", quickstart_chat.STAGES)
def test_later_stages_follow_the_model_of_the_first(stage):
    recipe = load_config(RECIPES / f"quickstart-{stage}.toml")
    same = load_config(RECIPES / "quickstart.toml", ["--model.vocab_size", "4096", "--parallel.tensor", "2"])
    assert quickstart_chat.differences(same, recipe) == []
    given = ["--model.layers", "6", "--parallel.tensor", "2", "--model.qk_norm", "true", "--kernels.rope", "reference"]
    other = load_config(RECIPES / "quickstart-gpu.toml", given)
    found = load_config(RECIPES / f"quickstart-{stage}.toml", quickstart_chat.differences(other, recipe))
    assert (found.model, found.kernels) == (other.model, other.kernels)
    assert found.train.precision == "bf16" and found.train.seq_length == recipe.train.seq_length
    assert found.parallel == recipe.parallel


@pytest.mark.fast
def test_the_dialogue_asks_held_out_problems_of_every_kind():
    said = quickstart_chat.dialogue()
    assert said == quickstart_chat.dialogue() and len(said) >= 3
    text = " ".join(said)
    assert "What is " in text and "Here is a list" in text and " has the " in text


@pytest.mark.fast
def test_the_copies_divide_the_recipes_batches(monkeypatch):
    monkeypatch.setattr(stages, "own_cores", lambda: set(range(16)))
    for device in ("cpu", "cuda"):
        assert [stages.Ranks(processes, device).copies().processes for processes in (1, 2, 3, 4, 8)] == [1, 2, 1, 2, 2]
    for stage in quickstart_chat.STAGES:
        config = load_config(RECIPES / f"quickstart-{stage}.toml")
        assert all(config.micro_batches(processes) >= 1 for processes in (1, 2))
    monkeypatch.setattr(stages, "own_cores", lambda: {3})
    assert stages.Ranks(4, "cpu").copies() == stages.Ranks(1, "cpu")


@pytest.mark.slow
def test_from_text_to_a_dialogue(tmp_path):
    source = Path(subprocess.__file__).parent
    files = [str(source / name) for name in ("subprocess.py", "argparse.py", "typing.py", "inspect.py")]
    out = tmp_path / "run"
    small = ["--model.layers", "2", "--model.hidden_size", "64", "--train.seq_length", "64"]
    command = [sys.executable, str(ROOT / "launch/quickstart.py"), "--chat", "--out", str(out), "--device", "cpu"]
    command += ["--processes", "2", "--steps", "2", "--input", *files, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "quickstart.json").read_text())
    assert set(results["answers"]) == {"pretrained", "sft", "grpo"}
    assert all(score["questions"] == quickstart_chat.QUESTIONS for score in results["answers"].values())
    said = results["dialogue"]
    assert len(said) == 2 * len(quickstart_chat.dialogue())
    assert said[0] == f"user: {quickstart_chat.dialogue()[0]}" and said[1].startswith("assistant: ")
    for stage in quickstart_chat.STAGES:
        assert load_config(out / stage / "config.toml").model.hidden_size == 64
        assert len((out / stage / "metrics.jsonl").read_text().splitlines()) == 2
    last = done.stdout.splitlines()[-1]
    assert last == quickstart_chat.farewell(out).splitlines()[-1]
    talk = subprocess.run(
        [*shlex.split(last.removeprefix("$ ")), "--max-new-tokens", "4"],
        input="What is 2 plus 3?\n",
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert talk.returncode == 0 and "Traceback" not in talk.stderr, talk.stderr

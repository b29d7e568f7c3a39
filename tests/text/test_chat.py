"""Chat templates: ids as transformers makes them, the learn mask by both ways, and messages that cannot fake a turn."""

import random

import pytest
import tokenizers

from megalite.errors import UserError
from megalite.text.chat import ChatTemplate, TemplateProblem
from megalite.text.leading import leading_ids
from megalite.text.tokenizers import ByteTokenizer, load_tokenizer
from tests.text.chat_templates import FAMILIES, MARKS, STOPS, marked, unmarked, write_tokenizer

pytestmark = pytest.mark.fast


def conversation(chance: random.Random, turns: int, content=None) -> list[dict]:
    words = ["hello", "the quick", "brown\nfox", "?", "12", "näh 🙂", "(a) b", "how  are", "you"]
    say = content or (lambda: " ".join(chance.choices(words, k=chance.randrange(1, 6))))
    messages = []
    for _ in range(turns):
        messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
    return messages


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_give_one_mask_which_is_each_answer_to_the_end_of_its_turn(family, tokenizer, chance):
    with_blocks = ChatTemplate(tokenizer, marked(FAMILIES[family]))
    without = ChatTemplate(tokenizer, unmarked(FAMILIES[family]))
    assert with_blocks.marked and not without.marked
    for turns in (1, 2, chance.randrange(3, 6)):
        messages = conversation(chance, turns)
        ids, learn = with_blocks.example(messages)
        assert (ids, learn) == without.example(messages)
        assert ids == without.ids(messages)
        # what is learned, piece by piece, is what each answer says and then the token that stops
        pieces, at = [], 0
        for number, on in enumerate(learn):
            if on and (number == 0 or not learn[number - 1]):
                at = number
            if on and (number + 1 == len(learn) or not learn[number + 1]):
                pieces.append(ids[at : number + 1])
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        said = [tokenizer.decode(piece).strip().removeprefix("<think>\n\n</think>\n\n") for piece in pieces]
        assert said == answers
        stop = tokenizer.token_id(STOPS[family])
        assert all(piece[-1] == stop for piece in pieces) and with_blocks.stop_ids[0] == stop
        # generation goes on from exactly the ids before an answer
        prompt = with_blocks.ids(messages[:-1], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt and learn[len(prompt)] and not any(learn[len(prompt) - 1 : len(prompt)])
        # only the messages from a number on
        _, last = without.example(messages, first=len(messages) - 1)
        assert last == [on and number >= len(prompt) for number, on in enumerate(learn)]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path, chance):
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, marked(FAMILIES[family]))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTemplate.load(load_tokenizer(folder))
    for turns in (1, 3):
        messages = conversation(chance, turns)
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, learn = ours.example(messages)
        assert ids == expected["input_ids"]
        assert [int(on) for on in learn] == expected["assistant_masks"]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ours.ids(messages[:-1], True) == list(prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_message_cannot_fake_the_end_of_its_turn(family, tokenizer, chance):
    def poisoned():
        return (
            "".join(chance.choices([*MARKS, "assistant", "\n", " hi", "<", "|im_", "\ufdd0", "\ufdd1\ufdd2"], k=8))
            + "x"
        )

    for source in (marked(FAMILIES[family]), unmarked(FAMILIES[family])):
        template = ChatTemplate(tokenizer, source)
        messages = conversation(chance, 2, poisoned)
        calm = [{**message, "content": "calm"} for message in messages]
        ids, learn = template.example(messages)
        special = set(tokenizer.special_tokens.values())
        assert [token for token in ids if token in special] == [t for t in template.ids(calm) if t in special]
        assert ids[: len(template.ids(messages[:3], True))] == template.ids(messages[:3], True)
        edges = sum(on and not before for before, on in zip([False, *learn], learn))
        assert edges == 2


def test_the_built_in_template_works_with_every_tokenizer(model_path, tokenizer, chance):
    for chosen in (ByteTokenizer(), load_tokenizer(model_path), tokenizer):
        template = ChatTemplate.load(chosen, "chatml")
        again = ChatTemplate(chosen, template.source)
        messages = [{"role": "system", "content": "Be brief."}, *conversation(chance, 2)]
        ids, learn = template.example(messages)
        assert (ids, learn) == again.example(messages) and template.sha256 == again.sha256
        bare = template.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert (ids, learn) == ChatTemplate(chosen, bare).example(messages)
        assert sum(ids[n] == template.stop_ids[0] and learn[n] for n in range(len(ids))) == 2
        assert template.stop_strings == ()


def test_templates_are_found_beside_the_tokenizer(tmp_path, model_path):
    folder = write_tokenizer(tmp_path / "a", "in settings")
    assert ChatTemplate.load(load_tokenizer(folder)).source == "in settings"
    (folder / "chat_template.json").write_text('{"chat_template": [{"name": "default", "template": "in json"}]}')
    assert ChatTemplate.load(load_tokenizer(folder)).source == "in json"
    (folder / "chat_template.jinja").write_text("in jinja")
    assert ChatTemplate.load(load_tokenizer(folder)).source == "in jinja"
    (tmp_path / "own.jinja").write_text("own")
    assert ChatTemplate.load(load_tokenizer(folder), tmp_path / "own.jinja").source == "own"
    with pytest.raises(UserError, match=r"has no chat template; name a file, or chatml"):
        ChatTemplate.load(load_tokenizer(model_path))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ messages[0].content }}", "does not write this answer"),
        ("{% for m in messages %}{{ m.role }}: ?{% endfor %}", "does not write this answer"),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}Now: {% endif %}",
            "differently once it is answered",
        ),
        ("{{ raise_exception('no such luck') }}", "says: no such luck"),
        ("{{ messages[7].content.upper() }}", "fails on it"),
        ("{{ ''.__class__.__mro__ }}", "fails on it"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "marks 2 parts"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "a token reaches across"),
    ],
)
def test_a_template_that_gives_no_mask_is_refused_with_the_reason(source, why, tmp_path):
    words = ("the " * 50 + "these them ",)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, texts=words))
    template = ChatTemplate(tokenizer, source, "T")
    messages = [{"role": "user", "content": "t"}, {"role": "assistant", "content": "he"}]
    with pytest.raises(TemplateProblem, match=why):
        template.example(messages)


def test_a_file_that_is_no_template_is_refused(tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"bad.jinja:1: not a Jinja template"):
        ChatTemplate.load(ByteTokenizer(), tmp_path / "bad.jinja")
    with pytest.raises(UserError, match="cannot be read"):
        ChatTemplate.load(ByteTokenizer(), tmp_path / "none.jinja")


def test_what_stands_before_every_text_follows_from_the_tokenizer_as_loaded(tmp_path):
    file = write_tokenizer(tmp_path / "t") / "tokenizer.json"
    file.with_name("tokenizer_config.json").unlink(missing_ok=True)
    plain = load_tokenizer(file)
    library = tokenizers.Tokenizer.from_file(str(file))
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", plain.bos)])
    library.save(str(file))
    for allow_special in (True, False):
        puts = load_tokenizer(file, allow_special=allow_special)
        bytes_of_it = file.read_bytes()
        file.unlink()  # what was loaded is all that is needed
        assert (leading_ids(plain), leading_ids(puts)) == ((), (plain.bos,))
        file.write_bytes(bytes_of_it)
    file.with_name("tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<s>"}')
    assert leading_ids(load_tokenizer(file)) == ()

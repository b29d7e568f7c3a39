"""Reading configurations: recipes, overrides, derived fields, round trips, and the words of what is refused."""

import dataclasses
import random
import subprocess
import sys

import pytest

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, load_config, parse_command_line, to_toml
from megalite.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nlayers = 3\nheads = 6\nhidden_size = 96\nvocab_size = 101\nrope_theta = 500000\n'
        '[data]\ntrain = [[0.7, "a"], [3, "b"]]\n'
        '[parallel]\ntensor = 2\n'
    )  # fmt: skip
    return path


def test_recipe_with_overrides(recipe):
    words = "--model.layers 5 --train.precision=fp32 --optimizer.lr 1e-3 --train.steps 1e2 --model.layers 7"
    config = load_config(recipe, words.split())
    assert (config.model.layers, config.model.heads, config.train.precision) == (7, 6, "fp32")
    assert config.optimizer.lr == 1e-3 and config.train.steps == 100 and isinstance(config.train.steps, int)
    assert config.model.rope_theta == 500000.0 and isinstance(config.model.rope_theta, float)
    assert config.data.train == ((0.7, "a"), (3.0, "b"))


@pytest.mark.parametrize("word", ["true", "True", "false", "False"])
def test_booleans_in_both_spellings(word):
    config = load_config(None, ["--model.qk_norm", word, "--parallel.tensor", "2", f"--parallel.sequence={word}"])
    assert config.model.qk_norm is config.parallel.sequence is (word.lower() == "true")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["a", "b"]', ("a", "b")),
        ("['x y']", ("x y",)),
        ("plain/prefix", ("plain/prefix",)),
        ('[[0.25, "a"], [1, "b"]]', ((0.25, "a"), (1.0, "b"))),
        ("[]", ()),
    ],
)
def test_lists_of_sources(text, value):
    assert load_config(None, ["--data.train", text]).data.train == value


def test_other_lists_and_tables():
    scaling = '{type = "yarn", factor = 4, original_max_position_embeddings = 64}'
    config = load_config(
        None, ["--data.split", "969,30,1", "--train.batch_ramp", "[2, 2, 100]", "--model.rope_scaling", scaling]
    )
    assert config.data.split == (969.0, 30.0, 1.0) and config.train.batch_ramp == (2, 2, 100)
    assert config.model.rope_scaling == {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


def test_texts_are_taken_as_they_stand():
    config = load_config(None, ["--run.dir", "true", "--data.tokenizer", "'quoted.model'", "--checkpoint.load", "12"])
    assert (config.run.dir, config.data.tokenizer, config.checkpoint.load) == ("true", "quoted.model", "12")


def test_derived_fields():
    model = ModelConfig(hidden_size=192, heads=6)
    assert (model.kv_heads, model.head_dim, model.ffn_hidden_size) == (6, 32, 512)
    assert ModelConfig(hidden_size=192, heads=6, kv_heads=2, head_dim=40).head_dim == 40
    assert [ParallelConfig(tensor=tensor).sequence for tensor in (1, 2)] == [False, True]
    assert ParallelConfig(tensor=1, sequence=True).sequence is False
    assert ParallelConfig(tensor=4, sequence=False).sequence is False
    assert load_config(None, ["--kernels.default", "reference"]).kernels.attention == "reference"
    config = load_config(None, ["--kernels.default", "reference", "--kernels.attention", "sdpa", "--optimizer.lr", "2"])
    assert config.kernels.attention == "sdpa" and config.optimizer.min_lr == 0.2


def test_resolved_configuration_round_trips(recipe, tmp_path):
    config = load_config(recipe, ["--train.batch_ramp", "[2,2,10]", "--model.rope_scaling", '{type="linear",factor=2}'])
    saved = tmp_path / "config.toml"
    saved.write_text(to_toml(config))
    assert load_config(saved) == config
    assert load_config(saved, ["--model.layers", "9"]) == dataclasses.replace(
        config, model=dataclasses.replace(config.model, layers=9)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--parallel.tensr", "2"], "--parallel.tensr is unknown; did you mean parallel.tensor?"),
        (["--train.lr", "2"], "--train.lr is unknown; did you mean optimizer.lr?"),
        (["--paralel.tensor", "2"], "--paralel.tensor is unknown; did you mean parallel.tensor?"),
        (
            ["--xyzzy.q", "2"],
            "--xyzzy.q is unknown; sections are run, model, parallel, data, train, eval, kernels, recovery,",
        ),
        (["--log.qqqq", "2"], "--log.qqqq is unknown; [log] has interval, tensorboard, wandb"),
        (["--model.layers", "many"], "model.layers = 'many' is not a whole number"),
        (["--model.layers", "2.5"], "model.layers = 2.5 is not a whole number"),
        (["--model.layers", "true"], "model.layers = true is not a whole number"),
        (["--optimizer.lr", "inf"], "optimizer.lr = inf is not a number"),
        (["--parallel.sequence", "maybe"], "parallel.sequence = 'maybe' is not true or false"),
        (["--parallel.sequence", "1"], "parallel.sequence = 1 is not true or false"),
        (
            ["--parallel.schedule", "1F1B"],
            "parallel.schedule = '1F1B' is unknown; it must be one of gpipe, 1f1b, interleaved, zb_h1, zb_v, or",
        ),
        (["--train.batch_ramp", "[1, 2.5, 3]"], "train.batch_ramp[1] = 2.5 is not a whole number"),
        (["--data.train", '[["a", 0.3]]'], "data.train has ['a', 0.3]; its entries are prefixes"),
        (["--data.train", '[["x", "a"]]'], "data.train has ['x', 'a']; its entries are prefixes"),
        (["--data.train", "7"], "data.train = 7 is not a list of prefixes"),
        (["--model.rope_scaling", "yarn"], "model.rope_scaling = 'yarn' is not a table"),
        (["--model.layers"], "--model.layers has no value; write --model.layers followed by a whole number"),
        (["--model.layers", "--model.heads", "2"], "--model.layers has no value"),
        (["--verbose"], "'--verbose' is not understood; overrides are written --section.field value"),
        (["stray"], "'stray' is not understood"),
    ],
)
def test_refused_overrides(overrides, message):
    with pytest.raises(UserError) as refusal:
        load_config(None, overrides)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nlayers = 2\n", "section [modle] of {path} is unknown; did you mean model?"),
        ("[model]\nlayer = 2\n", "model.layer is unknown; did you mean model.layers?"),
        ("layers = 2\n", "section [layers] of {path} is unknown"),
        ("model = 2\n", "model = 2 in {path} stands outside a section"),
        ("[model\nlayers = 2\n", "recipe {path} is not valid TOML"),
        ("[run]\ndir = 5\n", "run.dir = 5 is not a text in quotes"),
        ('[train]\nprecision = "fp16"\n', "train.precision = 'fp16' is not one of fp32, bf16"),
    ],
)
def test_refused_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert message.format(path=path) in str(refusal.value)


def test_missing_recipe_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_command_line(recipe):
    command = parse_command_line([str(recipe), "--check", "--model.layers", "4"])
    assert command.check_only and command.config.model.layers == 4
    assert parse_command_line([]).config == Config() and not parse_command_line([]).check_only


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_command_line(["--help"])
    printed = capsys.readouterr()
    assert leaving.value.code == 0 and not printed.err
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert f"--{section.name}.{field.name}" in printed.out


def test_quantities_of_a_layout():
    config = Config(
        model=ModelConfig(vocab_size=101),
        parallel=ParallelConfig(tensor=4, pipeline=2, schedule="interleaved", virtual_stages=3),
        train=TrainConfig(global_batch_size=48, micro_batch_size=2, seq_length=128),
    )
    assert config.model_parallel == 8 and config.stages == 6 and config.padded_vocab_size == 104
    assert config.data_parallel(32) == 4 and config.micro_batches(32) == 6 and config.micro_batches(32, 16) == 2
    assert config.tokens_per_step == 48 * 128


def test_batch_ramp_counts_like_a_step_by_step_run():
    draw = random.Random()
    for _ in range(20):
        start, increment, levels = draw.randint(1, 8), draw.randint(1, 8), draw.randint(1, 6)
        ramp = (start, increment, draw.randint(1, 500))
        config = Config(train=TrainConfig(global_batch_size=start + increment * levels, batch_ramp=ramp))
        assert config.batch_sizes[0] == start and config.batch_sizes[-1] == config.train.global_batch_size
        consumed, sizes = 0, []
        for step in range(200):
            assert config.samples_after(step) == consumed, ramp
            sizes.append(config.batch_size_at(consumed))
            consumed += sizes[-1]
        assert sizes == sorted(sizes) and set(sizes) <= set(config.batch_sizes)
        assert all(config.batch_size_at(ramp[2] + extra) == config.train.global_batch_size for extra in (0, 1, 7))


def test_reading_a_configuration_does_not_load_torch(recipe):
    code = (
        "import sys; from megalite.config import load_config; load_config(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"

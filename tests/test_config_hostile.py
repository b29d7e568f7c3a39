"""Whatever a recipe or an override holds, it is read and checked, or refused in one line, in bounded time."""

import os
import time
from typing import get_type_hints

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import Config, build_config, load_config, to_toml
from megalite.config.check import check_layout
from megalite.config.load import MOST_RECIPE_BYTES, read_recipe
from megalite.errors import UserError

pytestmark = pytest.mark.fast

FIELDS = [(section, name) for section, kind in get_type_hints(Config).items() for name in get_type_hints(kind)]
EXTREMES = st.sampled_from(
    [0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 10**4000, 1e308, -1e308, 1e-320, float("inf"), float("nan"), True, ""]
)
TEXTS = st.text(max_size=12) | st.sampled_from(["a\0b", "a\nb", "\ud800", "x" * 100_000, "/dev/zero", "auto", "1f1b"])
SCALARS = EXTREMES | st.integers(-4, 4096) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "factor", "original_max_position_embeddings", "beta_fast", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
RAMPS = st.lists(st.integers(-2, 9) | EXTREMES, min_size=2, max_size=4)


def one_line(refusal: UserError) -> None:
    message = str(refusal)
    assert message and len(message) < 2000 and message.isprintable(), message


def read_and_check(tables: dict) -> None:
    """Both ways in; what is accepted must survive its own round trip and be checked in a moment."""
    started = time.process_time()
    try:
        config = build_config(tables)
        if not config.run.dir.startswith("/dev"):
            to_toml(config).encode()
        check_layout(config, 4)
        config.samples_after(config.train.steps)
    except UserError as refusal:
        one_line(refusal)
    assert time.process_time() - started < 2


@given(st.sampled_from(FIELDS), VALUES)
@settings(max_examples=600, deadline=None)
def test_any_value_in_any_field(field, value):
    read_and_check({field[0]: {field[1]: value}})


@given(RAMPS, st.sampled_from([8, 12, 2**24, 10**9]), st.sampled_from([1, 1000, 2**31 - 1]))
@settings(max_examples=200, deadline=None)
def test_any_ramp(ramp, batch, steps):
    read_and_check({"train": {"batch_ramp": ramp, "global_batch_size": batch, "steps": steps}})


@given(st.sampled_from(FIELDS), st.text(max_size=30) | st.sampled_from(["[" * 5000, "9" * 5000, "1\nx = 2", "nan"]))
@settings(max_examples=300, deadline=None)
def test_any_word_on_the_command_line(field, word):
    try:
        check_layout(load_config(None, [f"--{field[0]}.{field[1]}={word}"]), 2)
    except UserError as refusal:
        one_line(refusal)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nlayers = " + "9" * 5000, "a number has too many digits"),
        ("[model]\nlayers = 0x" + "f" * 5000, "model.layers = a value that is too large to show is too large"),
        ("[model]\nlayers = " + "9" * 400, "is too large; it must be at least 1 and at most 10000"),
        ("[optimizer]\nlr = 1" + "0" * 400, "is too large for a number"),
        ("[data]\ntrain = " + "[" * 20_000 + "]" * 20_000, "lie too deep in each other"),
        ("[data]\ntrain = " + "[" * 90 + "]" * 90, "data.train has [[["),
        ('[run]\ndir = "a\\u0000b"', "run.dir = a\\x00b has the character '\\x00'"),
        ('[run]\ndir = "a\\nrm"', "run.dir = a\\nrm has the character '\\n'"),
        ('[data]\ntrain = ["a\\u0000"]', "which has the character '\\x00'; give the prefix"),
        ('[model]\nrope_scaling = {type = ["yarn"]}', "model.rope_scaling.type = ['yarn'] is unknown"),
        ("[model]\nlayers = [2]", "model.layers = [2] is not a whole number"),
        ('[train]\nprecision = ["bf16"]', "train.precision = ['bf16'] is not one of fp32, bf16"),
        ("a." * 3000 + "b = 1", "section [a]"),
        ("#" * (MOST_RECIPE_BYTES + 1), f"more than {MOST_RECIPE_BYTES:,}"),
    ],
    ids=range(14),
)
def test_hostile_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        check_layout(load_config(path), 1)
    one_line(refusal.value)
    assert message in str(refusal.value)


def test_recipes_that_never_end_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("fifo.toml", "zero.toml", "bytes.toml", "\0.toml", "x" * 5000):
        with pytest.raises(UserError) as refusal:
            load_config(f"{tmp_path}/{name}")
        one_line(refusal.value)


@given(st.dictionaries(st.sampled_from(["run", "model", "train"]), st.dictionaries(st.text(max_size=5), SCALARS)))
@settings(max_examples=100, deadline=None)
def test_any_recipe_file(tmp_path_factory, tables):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    try:
        path.write_text(tomli_w.dumps(tables))
    except ValueError:
        return  # not a TOML file
    try:
        build_config(read_recipe(path))
    except UserError as refusal:
        one_line(refusal)

"""What a run needs before it starts: parameters, FLOPs, memory of a rank by part, time of a step, days and money.

python tools/plan.py --recipe launch/recipes/llama3-8b-8gpu.toml --devices 8 --device-type h100
python tools/plan.py --recipe RECIPE.toml --devices 64 --device-type h200 --tokens 1e12 --price-per-hour 3 --json
python tools/plan.py --recipe RECIPE.toml --devices 64 --device-type h100 --search
python tools/plan.py --recipe RECIPE.toml --devices 8 --device-type a100 --parallel.tensor 4 --train.recompute full

docs/planning.md tells what is modelled and how near it comes to published and measured numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from rich.console import Console

from megalite.cli import Parser, nonempty, positive, program
from megalite.config import Config, load_config
from megalite.config.bounds import AtLeast
from megalite.config.load import parse_overrides
from megalite.errors import UserError
from megalite.planning import DEVICES, Plan, estimate
from megalite.planning.search import search
from megalite.planning.tables import render, render_search
from megalite.train.inputs import resolve_tokenizer

WIDTH = 120
"""Columns of the tables where the output is not a terminal."""

DEVICE_COUNT = AtLeast(1, 1 << 20)

EPILOG = "also: --SECTION.FIELD VALUE lays any field over the recipe's, as for the trainer"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `overrides` holds the `--section.field value`."""
    parser = Parser(__doc__, EPILOG, overrides=parse_overrides)
    add = parser.add_argument
    add("--recipe", required=True, type=nonempty, metavar="FILE", help="TOML file, as the trainer takes it")
    add("--devices", required=True, type=int, metavar="N", help="devices (ranks) of the job")
    add("--device-type", required=True, choices=tuple(DEVICES), help="kind of device; cpu: one core a rank")
    add("--tokens", type=positive, metavar="T", help="tokens to train on, as 1e12 (default: the recipe's steps)")
    add("--price-per-hour", type=positive, metavar="P", help="dollars for one device and hour (default: a usual price)")
    add("--search", action="store_true", help="rank all layouts that fit: table, words and TOML")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(argv)
    if message := DEVICE_COUNT.refusal(options.devices, "--devices"):
        raise UserError(message)
    return options


def with_vocabulary(config: Config) -> Config:
    """`model.vocab_size` taken from the tokenizer where the recipe leaves it open and the file is here."""
    if config.model.vocab_size or not config.data.tokenizer:
        return config
    if config.data.tokenizer != "byte" and not Path(config.data.tokenizer).exists():
        raise UserError(
            f"model.vocab_size = 0 takes the size from data.tokenizer = {config.data.tokenizer}, which does not exist; "
            "give --model.vocab_size N"
        )
    return resolve_tokenizer(config)[0]


def search_layouts(options: argparse.Namespace, config: Config) -> None:
    """Print the ranking; the recipe's own layout need not be allowed."""
    device = DEVICES[options.device_type]
    arguments = (config, options.devices, device, options.tokens, options.price_per_hour)
    own: Plan | None = None
    with contextlib.suppress(UserError):
        own = estimate(*arguments)
    ranking = search(*arguments)
    if options.json:
        found = {"refused": ranking.refused, "too_large": ranking.too_large, "fitting": ranking.fitting}
        print(json.dumps(found | {"best": [plan.as_json() for plan in ranking.plans]}))
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(
            render_search(ranking, own, device), highlight=False, markup=False
        )


@program
def main() -> None:
    options = parse()
    config = with_vocabulary(load_config(options.recipe, options.overrides))
    if options.search:
        search_layouts(options, config)
        return
    plan = estimate(config, options.devices, DEVICES[options.device_type], options.tokens, options.price_per_hour)
    if options.json:
        print(json.dumps(plan.as_json()))
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(render(plan), highlight=False, markup=False)


if __name__ == "__main__":
    main()

"""Text from a checkpoint: a run directory, a checkpoint inside one, or a Hugging Face directory.

python tools/generate.py --checkpoint runs/quickstart --prompt "def main():" --max-new-tokens 200
torchrun --nproc-per-node 4 tools/generate.py --checkpoint DIR --prompt TEXT --parallel.tensor 2 --parallel.pipeline 2
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from megalite.cli import nonempty, program, whole
from megalite.config.bounds import quoted
from megalite.errors import UserError
from megalite.generation.generator import Completion, Generator, Limits, Listener
from megalite.generation.loading import Loaded, Opened, checkpoint_parser, load_model, open_checkpoint, with_one_voice
from megalite.generation.sampling import Sampling


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `overrides` holds the `--section.field value`."""
    parser = checkpoint_parser(__doc__)
    add = parser.add_argument
    add("--prompt", nargs="+", action="gather", metavar="TEXT", help="one or more texts to go on from")
    add("--prompt-ids", metavar="JSON", help='token ids "[1,2,3]" or a list of such lists; prints {"ids": [[...]]}')
    add("--max-new-tokens", type=whole(), default=128, metavar="N", help="tokens to add at most (default 128)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (default 0.8)")
    add("--top-k", type=whole(0), default=0, metavar="K", help="choose among the K likeliest tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that make up P (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default 0)")
    add(
        "--stop",
        nargs="+",
        action="gather",
        type=nonempty,
        default=(),
        metavar="TEXT",
        help="end before any of these strings",
    )
    add(
        "--stop-ids",
        default="[]",
        metavar="JSON",
        help='token ids that end a row, "[2]"; the tokenizer\'s own otherwise',
    )
    add("--ignore-eos", action="store_true", help="go on after the end of a text")
    add("--bos", choices=("auto", "yes", "no"), default="auto", help="begin with the beginning-of-text token")
    add("--tokenizer", default="", metavar="FILE", help="use this tokenizer instead of the checkpoint's own")
    add("--json", action="store_true", help="print one JSON object a prompt, with ids, log-probabilities and reason")
    add("--cuda-graph", action="store_true", help="record a token's kernels as a CUDA graph and replay it")
    options = parser.parse_args(argv)
    if (options.prompt is None) == (options.prompt_ids is None):
        raise UserError('give either --prompt TEXT or --prompt-ids "[1,2,3]"')
    return options


def ids_from_json(text: str, option: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f'{option} {quoted(text)} is not a JSON list of token ids, such as "[1,2,3]"')
    return value


def checked_ids(values: list[Any], vocab_size: int, option: str) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise UserError(f"{option} has {quoted(value)}; token ids of this model are 0 to {vocab_size - 1}")
    return values


def prompts_of(options: argparse.Namespace, opened: Opened) -> list[list[int]]:
    """The token ids of every prompt."""
    vocab_size = opened.model["vocab_size"]
    if options.prompt_ids is not None:
        values = ids_from_json(options.prompt_ids, "--prompt-ids")
        rows = values if values and isinstance(values[0], list) else [values]
        if not all(isinstance(row, list) for row in rows):
            raise UserError("--prompt-ids mixes ids and lists of ids")
        return [checked_ids(row, vocab_size, "--prompt-ids") for row in rows]
    tokenizer = opened.require_tokenizer("give --tokenizer FILE, or token ids with --prompt-ids")
    bos = list(opened.bos)
    if options.bos != "auto":
        if options.bos == "yes" and tokenizer.bos is None:
            raise UserError("--bos yes: this tokenizer has no beginning-of-text token")
        bos = [tokenizer.bos] if options.bos == "yes" and tokenizer.bos is not None else []
    rows = [bos + ids.tolist() for ids in tokenizer.encode_batch(options.prompt)]
    start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eod
    rows = [row or ([] if start is None else [start]) for row in rows]
    return [checked_ids(row, vocab_size, "--prompt (by its tokenizer)") for row in rows]


def limits_of(options: argparse.Namespace, opened: Opened) -> Limits:
    """Token ids given by hand run to the last token unless --stop-ids names an end; a text ends with its eos."""
    stop_ids = checked_ids(ids_from_json(options.stop_ids, "--stop-ids"), opened.model["vocab_size"], "--stop-ids")
    if not stop_ids and not options.ignore_eos and options.prompt_ids is None:
        stop_ids = list(opened.eos)
    return Limits(options.max_new_tokens, frozenset(stop_ids), tuple(options.stop))


def show(options: argparse.Namespace, completions: list[Completion]) -> None:
    """What has not been streamed."""
    if options.prompt_ids is not None:
        print(json.dumps({"ids": [completion.prompt_ids + completion.new_ids for completion in completions]}))
    elif options.json:
        escape = sys.stdout.encoding.lower() not in ("utf-8", "utf8")
        for prompt, completion in zip(options.prompt, completions):
            print(json.dumps({"prompt": prompt, **asdict(completion)}, ensure_ascii=escape))
    elif len(completions) == 1:
        print()
    else:
        for prompt, completion in zip(options.prompt, completions):
            print(f"{prompt}{completion.text}\n{'-' * 80}")


def stream_to_terminal(prompt: str) -> Listener:
    """Show the only prompt and then each piece as it comes."""
    sys.stdout.write(prompt)

    def show_piece(row: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    return show_piece


def generate(options: argparse.Namespace, opened: Opened, loaded: Loaded) -> None:
    prompts, limits = prompts_of(options, opened), limits_of(options, opened)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    tokenizer = opened.tokenizer if options.prompt_ids is None or limits.stop_strings else None
    with loaded.model.generating() as stages:
        generator = Generator(stages, loaded.model.owners, loaded.mesh, loaded.config.model, graph=loaded.recorder)
        generator.check(prompts, limits, tokenizer)
        streams = loaded.speaks and options.prompt is not None and len(prompts) == 1 and not options.json
        listener = stream_to_terminal(options.prompt[0]) if streams else None
        completions = generator.run(prompts, sampling, limits, tokenizer, listener)
    if loaded.speaks:
        show(options, completions)


@program
@with_one_voice
def main() -> None:
    options = parse()
    with (
        open_checkpoint(options.checkpoint, options.tokenizer) as opened,
        load_model(opened, options.overrides, cuda_graph=options.cuda_graph) as loaded,
    ):
        generate(options, opened, loaded)


if __name__ == "__main__":
    main()

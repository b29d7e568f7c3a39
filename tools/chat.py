"""A conversation with a trained model: in the terminal, or with --web in a page served from this machine only.

python tools/chat.py --checkpoint runs/quickstart-chat
python tools/chat.py --checkpoint DIR --web --port 8000
torchrun --nproc-per-node 4 tools/chat.py --checkpoint DIR --parallel.tensor 2 --parallel.pipeline 2
"""

from __future__ import annotations

import argparse
import secrets
from dataclasses import dataclass

from megalite.chat.speaker import Speaker, opening
from megalite.chat.terminal import talk
from megalite.chat.web import serve
from megalite.cli import program, whole
from megalite.errors import RunFailed, UserError
from megalite.generation.generator import Generator, Limits
from megalite.generation.loading import Loaded, Opened, checkpoint_parser, load_model, open_checkpoint, with_one_voice
from megalite.generation.sampling import Sampling
from megalite.text.chat import ChatTemplate, TemplateProblem
from megalite.text.tokenizers import Tokenizer


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = checkpoint_parser(__doc__)
    add = parser.add_argument
    add("--system", default="", metavar="TEXT", help="what the model is told before the conversation")
    add("--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token (default 0.7)")
    add("--top-k", type=whole(0), default=0, metavar="K", help="choose among the K likeliest tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that make up P (default 1)")
    add("--seed", type=int, metavar="S", help="the same seed and messages give the same answers (default: any)")
    add("--max-new-tokens", type=whole(), default=512, metavar="N", help="tokens of an answer at most (default 512)")
    add("--chat-template", default="", metavar="FILE", help="a Jinja file, or chatml; the checkpoint's own otherwise")
    add("--tokenizer", default="", metavar="FILE", help="use this tokenizer instead of the checkpoint's own")
    add("--web", action="store_true", help="serve a page on 127.0.0.1 instead of reading from the terminal")
    add("--port", type=whole(0), default=8765, metavar="N", help="of the page; 0 takes a free one (default 8765)")
    options = parser.parse_args(argv)
    if options.port > 65535:
        raise UserError(f"--port {options.port} is above 65535")
    return options


def check_system(template: ChatTemplate, system: str) -> None:
    """Raise UserError for a template that has no place for what the model is told."""
    try:
        template.render([*opening(system), {"role": "user", "content": "?"}], True)
    except TemplateProblem as error:
        raise UserError(f"{'--system: ' if system else ''}{error}") from None


@dataclass(frozen=True)
class Manner:
    """How the model speaks: found and checked before any weights are read."""

    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    limits: Limits


def manner_of(options: argparse.Namespace, opened: Opened) -> Manner:
    tokenizer = opened.require_tokenizer("a conversation needs one: give --tokenizer FILE")
    template = opened.chat_template(options.chat_template)
    check_system(template, options.system)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    sampling = Sampling(options.temperature, options.top_k, options.top_p, seed)
    limits = Limits(options.max_new_tokens, frozenset((*template.stop_ids, *opened.eos)), template.stop_strings)
    return Manner(tokenizer, template, sampling, limits)


def chat(options: argparse.Namespace, name: str, manner: Manner, loaded: Loaded) -> None:
    with loaded.model.generating() as stages:
        generator = Generator(stages, loaded.model.owners, loaded.mesh, loaded.config.model)
        speaker = Speaker(generator, manner.tokenizer, manner.template, manner.sampling, manner.limits)
        if not loaded.speaks:
            speaker.follow()
            return
        try:
            if options.web:
                serve(speaker, name, options.system, options.port)
            else:
                talk(speaker, options.system)
        except RunFailed:  # the others have found it too, and left
            raise
        except BaseException:
            speaker.leave()
            raise
        speaker.leave()


@program
@with_one_voice
def main() -> None:
    options = parse()
    with open_checkpoint(options.checkpoint, options.tokenizer) as opened:
        manner = manner_of(options, opened)
        with load_model(opened, options.overrides) as loaded:
            chat(options, opened.directory.resolve().name, manner, loaded)


if __name__ == "__main__":
    main()

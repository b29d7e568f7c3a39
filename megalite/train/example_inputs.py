"""The examples of an alignment run, opened as its recipe says. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.config.sources import Source, is_record_file, parse_sources
from megalite.data.blend import normalized
from megalite.data.example_file import ExampleFile, Maker, select
from megalite.data.examples import Examples, PackedExamples, Part, PromptDataset, Recipe
from megalite.data.sample_index import parse_split, split_spans
from megalite.errors import UserError
from megalite.observe.formatting import counted
from megalite.text.chat import ChatTemplate
from megalite.text.example_cache import tokenised
from megalite.text.tokenizers import load_tokenizer, tokenizer_hash

AlignmentData = PackedExamples | PromptDataset
NOUNS = {"sft": "conversation", "preference": "pair", "prompt": "prompt"}


def find_template(config: Config) -> ChatTemplate | None:
    """The chat template of a run; None if its recipe and its tokenizer name none. Raises `UserError`."""
    if not config.data.tokenizer:
        return None
    return ChatTemplate.find(load_tokenizer(config.data.tokenizer), config.data.chat_template)


def open_examples(config: Config, planned: int, cache_dir: Path) -> tuple[AlignmentData, AlignmentData | None]:
    """The training and validation data of `objective.data_format`, for `planned` rows; see `open_data`."""
    opener = _Opener(config, cache_dir)
    train = parse_sources(config.data.train, "data.train")
    valid = parse_sources(config.data.valid, "data.valid")
    if not train:
        raise UserError("data.train: no file given; give .jsonl or .parquet files, or prefixes of tokenised examples")
    wanted = config.train.eval_samples if config.train.eval_interval else 0
    split = config.data.split
    training = opener.open(train, planned, split, 0)
    if wanted and valid:
        return training, opener.open(valid, wanted)
    if wanted and split and parse_split(split)[1] > 0:
        return training, opener.open(train, wanted, split, 1)
    return training, None


class _Opener:
    """Opens files as one recipe wants them."""

    def __init__(self, config: Config, cache_dir: Path) -> None:
        self.config, self.cache_dir = config, cache_dir
        self.form = config.objective.data_format
        # a prompt that is cut is another question
        self.overlong = "drop" if self.form == "prompt" else config.data.overlong
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        template = ChatTemplate.find(tokenizer, config.data.chat_template) if tokenizer else None
        self.maker = Maker(
            self.form,
            config.data.tokenizer,
            tokenizer_hash(tokenizer) if tokenizer else "",
            template.name if template else "",
            template.sha256 if template else "",
        )
        self.vocab_size = config.model.vocab_size or None
        self._files: dict[str, ExampleFile] = {}

    def open(
        self, sources: Sequence[Source], planned: int, split: Sequence[float] = (), part: int = 0
    ) -> AlignmentData:
        """The data of some files, or of one part of their split (by examples)."""
        given = [source.weight for source in sources if source.weight is not None]
        shares: Sequence[float | None] = normalized(given) if given else [None] * len(sources)
        parts = [self._part(source, share, split, part) for source, share in zip(sources, shares)]
        config = self.config
        prompts = self.form == "prompt"
        recipe = Recipe(
            config.train.seq_length,
            config.run.seed,
            config.data.packing and not prompts,
            self.overlong,
            self.maker.tokenizer_sha256,
            self.maker.template_sha256,
            self.vocab_size,
        )
        examples = Examples(parts, recipe)
        return PromptDataset(examples) if prompts else PackedExamples(examples, planned, self.cache_dir)

    def _part(self, source: Source, share: float | None, split: Sequence[float], part: int) -> Part:
        config, file = self.config, self._file(source.prefix)
        span = split_spans(split, len(file))[part] if split else range(len(file))
        room = config.train.seq_length
        if self.form == "prompt":
            room -= config.rollout.max_new_tokens
        return Part(file, span, select(file, span, room, self.overlong == "truncate"), share)

    def _file(self, prefix: str) -> ExampleFile:
        """The file, opened once: training and validation may be parts of one."""
        if prefix not in self._files:
            made = prefix
            if is_record_file(prefix):
                made = tokenised(prefix, self.maker, self.config.data.chat_template, self.vocab_size, self.cache_dir)
            self._files[prefix] = ExampleFile(made, self.maker, self.cache_dir)
        return self._files[prefix]


def describe_examples(config: Config, data: AlignmentData) -> tuple[str, ...]:
    """What was read, in words: examples, what was left out of them, the share of learned tokens, the template."""
    parts, noun = data.examples.parts, NOUNS[config.objective.data_format]
    selections = [part.selection for part in parts]
    total = sum(map(len, selections))
    words = [counted(total, noun)]
    left_out = {
        "too long": sum(selection.overlong for selection in selections),
        "with nothing to learn": sum(selection.unlearned for selection in selections),
    }
    words += [f"{count:,} {why} left out" for why, count in left_out.items() if count]
    if cut := sum(selection.cut for selection in selections):
        words.append(f"{cut:,} cut")
    if isinstance(data, PackedExamples):
        tokens = sum(int(selection.lengths.sum(dtype="int64")) for selection in selections)
        words.append(f"{sum(selection.learned for selection in selections) / tokens:.0%} of {tokens:,} tokens learned")
        rows = len(data.plan(0))
        words.append(f"{total / rows:.1f} a row" if config.data.packing else "one a row")
        if (times := len(data) / rows) >= 1.5:
            words.append(f"{times:,.0f} times your {noun}s")
    template = _template_used(parts)
    return (*words, f"template {template}") if template else tuple(words)


def _template_used(parts: Sequence[Part]) -> str:
    used: list[Any] = [part.file.facts["template"]["name"] for part in parts if part.file.facts.get("templated")]
    return str(used[0]) if used else ""

"""Reward and value models in Hugging Face's form: `...ForSequenceClassification` with one label.

Their files hold the decoder and `score.weight` [1, H] in place of the output layer. transformers reads the score at the
last token that is not padding. No padding token is written: an answer's own last token must not be taken for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megalite.model.decoder import CRITIC, OUTPUT, SCORE
from megalite.model.families import FileTensor
from megalite.model.families.family import whole

CAUSAL, SCORER = "ForCausalLM", "ForSequenceClassification"


def is_scorer(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of such a model."""
    named = config.get("architectures")
    listed = named if isinstance(named, list) else [named]
    return any(isinstance(name, str) and name.endswith(SCORER) for name in listed)


def causal_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the language model of the same decoder."""
    named = config.get("architectures")
    if not is_scorer(config) or not isinstance(named, list):
        return dict(config)
    names = [name.replace(SCORER, CAUSAL) if isinstance(name, str) else name for name in named]
    return {**config, "architectures": names}


def scorer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the scorer with the decoder of a language model's."""
    names = [name.replace(CAUSAL, SCORER) for name in config["architectures"]]
    return {**config, "architectures": names, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def scorer_tensors(tensors: Iterable[FileTensor], hidden: int) -> Iterator[FileTensor]:
    """The tensors of the scorer, from those of the language model."""
    yield from (tensor for tensor in tensors if tensor.name != OUTPUT)
    yield whole(SCORE, 1, hidden)


def as_critic(tensors: Iterable[FileTensor]) -> Iterator[FileTensor]:
    """The same tensors, read under the names that a critic's have in a checkpoint with its policy."""
    for tensor in tensors:
        parts = tuple(dataclasses.replace(part, name=CRITIC + part.name) for part in tensor.parts)
        yield dataclasses.replace(tensor, parts=parts)

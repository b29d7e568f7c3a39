"""Phi-3 and Phi-4: a Llama whose files hold queries, keys and values as one matrix, and gate and up as another.

Fields and defaults: `Phi3Config` of transformers. Variants with rotations of a part of each head, or with `longrope`,
are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields, FileTensor, Rows
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Which tensor of the files holds the rows of ours; those of one come in the order of the model."""


def _tensors(model: ModelConfig) -> Iterator[FileTensor]:
    parts: dict[str, list[Rows]] = {}
    for tensor in decoder_tensors(model):
        words = [FUSED.get(word, word) for word in tensor.name.split(".")]
        parts.setdefault(".".join(words), []).extend(tensor.parts)
    for name, rows in parts.items():
        yield FileTensor(name, (sum(part.count for part in rows), *rows[0].shape[1:]), tuple(rows))


def _read(fields: Fields) -> ModelConfig:
    window = fields.count("sliding_window", MOST_POSITIONS, null=0)
    model = read_decoder(fields, derived_sizes(fields), sliding_window=window)
    if model.rope_scaling:
        raise fields.refusal("rope_type", model.rope_scaling["type"], "is not of this architecture; default is")
    return model


def _write(model: ModelConfig) -> dict[str, Any]:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return write_decoder(model, sliding_window=model.sliding_window or None, **dropouts)


PHI3 = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    defaults={
        **DEFAULTS,
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    fixed={**FIXED, "resid_pdrop": (0.0,), "embd_pdrop": (0.0,)},
    without_effect=WITHOUT_EFFECT
    | {"original_max_position_embeddings": "belongs to longrope, which is refused where it is used"},
    read=_read,
    write=_write,
    tensors=_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)

"""What `train.invariant` and `train.batch_invariant` do not cover is refused, field by field (docs/invariance.md)."""

from __future__ import annotations

from collections.abc import Mapping

from megalite.config.bounds import shown
from megalite.config.check_alignment import Refuse
from megalite.config.schema import Config
from megalite.registry import BUILT_IN

_RANKS: dict[str, tuple[object, ...]] = {
    "parallel.sequence": (False,),
    "parallel.context": (1,),
    "parallel.zero": (0, 1),
    "model.experts": (0,),
    "model.block": tuple(BUILT_IN["model.block"]),
    "model.attention": ("gqa",),
    "model.feed_forward": tuple(BUILT_IN["model.feed_forward"]),
    "train.fp8": ("none",),
    "optimizer.kind": ("adamw",),
    "objective.kind": ("next_token", "sft"),
    "adapter.kind": ("none",),
}
"""The values that `train.invariant` covers."""

_BATCH: dict[str, tuple[object, ...]] = {
    "objective.kind": ("ppo", "grpo"),
    "run.device": ("cpu",),
    "parallel.tensor": (1,),
    "parallel.context": (1,),
    "model.experts": (0,),
    "model.block": tuple(BUILT_IN["model.block"]),
    "model.attention": ("gqa",),
    "model.feed_forward": ("swiglu",),
    "model.final_logit_softcapping": (0.0,),
    "train.fp8": ("none",),
    "rollout.temperature": (1.0,),
    "adapter.kind": ("none",),
    "kernels.attention": ("auto",),
    "kernels.rms_norm": ("auto", "native"),
    "kernels.rope": ("auto", "native"),
    "kernels.swiglu": ("auto", "native"),
    "kernels.cross_entropy": ("auto", "native"),
}
"""The values that `train.batch_invariant` covers."""


def _refuse_uncovered(config: Config, only: Mapping[str, tuple[object, ...]], mode: str, refuse: Refuse) -> None:
    """Refuse the first field whose value is not among those covered by the field `mode`."""
    section, name = mode.split(".")
    setting, off = getattr(getattr(config, section), name), "false" if mode == "train.batch_invariant" else "0"
    for path, covered in only.items():
        section, name = path.split(".")
        if getattr(getattr(config, section), name) not in covered:
            remedy = f"use {' or '.join(shown(value) for value in covered)}, or {mode} = {off}"
            refuse(config, path, f"is not covered by {mode} = {shown(setting)}", remedy)


def check_batch_invariant(config: Config, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit `train.batch_invariant`."""
    if config.train.batch_invariant:
        _refuse_uncovered(config, _BATCH, "train.batch_invariant", refuse)


def check_invariant(config: Config, world_size: int, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit `train.invariant`."""
    parts = config.train.invariant
    if not parts:
        return
    if parts & (parts - 1):
        lower = 1 << parts.bit_length() - 1
        refuse(config, "train.invariant", "is not a power of two", f"use {lower} or {2 * lower}")
    _refuse_uncovered(config, _RANKS, "train.invariant", refuse)
    if config.model.qk_norm and config.model.qk_norm_scope != "head":
        problem = f"is not covered by train.invariant = {parts}"
        refuse(config, "model.qk_norm_scope", problem, "use head, or train.invariant = 0")
    for path in ("model.kv_heads", "model.ffn_hidden_size"):  # heads are a multiple of kv_heads
        section, name = path.split(".")
        size = getattr(getattr(config, section), name)
        if size % parts:
            remedy = f"use a multiple of {parts}, or a train.invariant that divides it"
            refuse(config, path, f"is not divisible by train.invariant = {parts}", remedy)
    if parts % config.parallel.tensor:
        problem = f"does not divide train.invariant = {parts}"
        refuse(config, "parallel.tensor", problem, "use a power of two up to it")
    copies = config.data_parallel(world_size)
    if parts % copies:
        problem = f"is not divisible by the {copies} copies of the model on {world_size} ranks"
        refuse(config, "train.invariant", problem, "use as many ranks that it is, or a larger power of two")

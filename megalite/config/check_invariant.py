"""What `train.invariant` does not cover is refused, field by field (docs/invariance.md)."""

from __future__ import annotations

from megalite.config.check_alignment import Refuse
from megalite.config.schema import Config
from megalite.registry import BUILT_IN

_ONLY: dict[str, tuple[object, ...]] = {
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
"""The values that it covers."""


def check_invariant(config: Config, world_size: int, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit `train.invariant`."""
    parts = config.train.invariant
    if not parts:
        return
    if parts & (parts - 1):
        lower = 1 << parts.bit_length() - 1
        refuse(config, "train.invariant", "is not a power of two", f"use {lower} or {2 * lower}")
    for path, covered in _ONLY.items():
        section, name = path.split(".")
        if getattr(getattr(config, section), name) not in covered:
            words = [str(value).lower() if isinstance(value, bool) else str(value) for value in covered]
            remedy = f"use {' or '.join(words)}, or train.invariant = 0"
            refuse(config, path, f"is not covered by train.invariant = {parts}", remedy)
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

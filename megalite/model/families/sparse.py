"""What families with experts share: their fields' limits, and a layer's experts, one by one or all in stacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import STACK, Fields, FileTensor, Rows, whole
from megalite.model.families.llama import MOST_FFN, WITHOUT_EFFECT, dense_tensors, gated_tensors

MOST_EXPERTS = 1 << 16

SPARSE_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "router_aux_loss_coef": "says how the router is trained: model.aux_loss",
    "output_router_logits": "says what to return",
}


def read_experts(fields: Fields, *names: str) -> int:
    """The number of experts, which goes by several names; those that are given must agree."""
    given = [name for name in names if fields.given(name)] or [names[0]]
    counts = [fields.count(name, MOST_EXPERTS) for name in given]
    if len(set(counts)) > 1:
        raise fields.refusal(given[0], counts[0], f"contradicts {given[1]} = {counts[1]}")
    return counts[0]


def read_chosen(fields: Fields, experts: int) -> int:
    """Experts of a token."""
    return fields.count("num_experts_per_tok", experts)


def read_groups(fields: Fields) -> dict[str, int]:
    """The groups of experts and how many of them a token may use, as fields of `ModelConfig`."""
    experts = fields.count("n_routed_experts", MOST_EXPERTS)
    groups = fields.count("n_group", experts, null=1)
    if experts % groups:
        raise fields.refusal("n_group", groups, f"does not divide n_routed_experts = {experts}")
    chosen, best = read_chosen(fields, experts), fields.count("topk_group", groups, null=1)
    if chosen > best * (experts // groups):
        problem = f"is more than the experts of topk_group = {best} out of n_group = {groups}"
        raise fields.refusal("num_experts_per_tok", chosen, problem)
    return {"router_groups": groups, "router_groups_per_token": best}


def read_shared_and_routed(fields: Fields, *names: str) -> dict[str, Any]:
    """The experts of DeepSeek's kind, as fields of `ModelConfig`; `names` as of `read_experts`."""
    experts = read_experts(fields, *names)
    return {
        "experts": experts,
        "experts_per_token": read_chosen(fields, experts),
        "expert_ffn_hidden_size": fields.count("moe_intermediate_size", MOST_FFN),
        "shared_experts": fields.count("n_shared_experts", MOST_EXPERTS),
        "router_scale": fields.number("routed_scaling_factor"),
    }


def shared_tensors(model: ModelConfig, layer: int, *, bias: bool = True) -> Iterator[FileTensor]:
    """What a sparse layer of DeepSeek's kind has besides router and experts: the router's `bias` and shared experts."""
    mlp, width = f"model.layers.{layer}.mlp.", model.shared_experts * model.expert_ffn_hidden_size
    if bias:
        yield whole(f"{mlp}gate.e_score_correction_bias", model.experts, fp32=True)
    yield from gated_tensors(f"{mlp}shared_experts.", model.hidden_size, width)


def expert_tensors(
    model: ModelConfig, layer: int, stored: str, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[FileTensor]:
    """Router and experts of a layer, each expert's three matrices by themselves; `stored` begins their names in the
    files, where gate, up and down are called `parts`."""
    own, hidden, ffn = f"model.layers.{layer}.mlp.", model.hidden_size, model.expert_ffn_hidden_size
    yield whole(f"{own}gate.weight", model.experts, hidden, stored_as=f"{stored}gate.weight")
    for expert in range(model.experts):
        for name, part in zip(("gate_proj", "up_proj", "down_proj"), parts):
            shape = (hidden, ffn) if name == "down_proj" else (ffn, hidden)
            place = f"experts.{expert}."
            yield whole(f"{own}{place}{name}.weight", *shape, stored_as=f"{stored}{place}{part}.weight")


def stacked_expert_tensors(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    """The same with all experts in two stacks, [E, 2 F, H] (each expert's gate above its up) and [E, H, F]."""
    own, hidden, ffn = f"model.layers.{layer}.mlp.", model.hidden_size, model.expert_ffn_hidden_size
    yield whole(f"{own}gate.weight", model.experts, hidden)

    def rows(expert: int, name: str, *shape: int) -> Rows:
        return Rows(f"{own}experts.{expert}.{name}.weight", shape, 0, shape[0])

    inner = [rows(e, name, ffn, hidden) for e in range(model.experts) for name in ("gate_proj", "up_proj")]
    outer = [rows(e, "down_proj", hidden, ffn) for e in range(model.experts)]
    yield FileTensor(f"{own[:-1]}{STACK}", (model.experts, 2 * ffn, hidden), tuple(inner))
    yield FileTensor(f"{own}experts.down_proj", (model.experts, hidden, ffn), tuple(outer))


def mixed_tensors(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    """The feed-forward part of a layer where some are dense, under megalite's own names."""
    if not model.is_sparse(layer):
        return dense_tensors(model, layer)
    return expert_tensors(model, layer, f"model.layers.{layer}.mlp.")


def mixed_stacked_tensors(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    """The same with the experts in stacks."""
    return stacked_expert_tensors(model, layer) if model.is_sparse(layer) else dense_tensors(model, layer)

"""What autograd really keeps: a stage is run once, and every tensor saved for backward is counted by its storage."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megalite.config import AdapterConfig, ModelConfig
from megalite.kernels import Kernels, select_kernels
from megalite.mesh import Group, Mesh
from megalite.model.adapter import make_adapter
from megalite.model.cost import NO_ADAPTER
from megalite.model.decoder import Stage
from megalite.parallel.context import ContextRegion
from megalite.placement import placed_parameters

META = torch.device("meta")


class SilentGroup(Group):
    """Ranks of which only this one exists: collectives on tensors without data have nothing to move."""

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Any:
        return _Done()

    def all_gather(self, output: Tensor, tensor: Tensor) -> Any:
        return _Done()

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Any:
        return _Done()

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Any:
        return _Done()

    def pass_on(self, output: Tensor, tensor: Tensor) -> Any:
        return _Done()


class _Done:
    def wait(self) -> None:
        return None


def silent_mesh(device: torch.device = META, **sizes: int) -> Mesh:
    return Mesh(device=device, make_group=lambda ranks, rank: SilentGroup(ranks, rank, None), **sizes)


def fused_kernels() -> Kernels:
    """The Triton kernels' autograd functions; on tensors without data only their shapes are computed."""
    from megalite.kernels import (
        adamw,
        cross_entropy,
        fp8,
        fp8_blocks,
        grouped,
        rms_norm_triton,
        rope_triton,
        swiglu,
        swiglu_triton,
        symmetric,
    )
    from megalite.kernels.attention import decode_triton, flash_triton
    from megalite.kernels.attention.widths import at_one_width

    return Kernels(
        rms_norm=rms_norm_triton.rms_norm,
        add_rms_norm=rms_norm_triton.add_rms_norm,
        rope=rope_triton.rope,
        rope_qkv=rope_triton.rope_qkv,
        attention=at_one_width(flash_triton.attention),
        attention_parts=flash_triton.FlashParts(),
        decode_attention=decode_triton.decode_attention,
        swiglu=swiglu_triton.swiglu,
        swiglu_again=swiglu_triton.swiglu_again,
        geglu=swiglu.geglu,
        grouped_product=grouped.grouped_product,
        grouped_input_gradient=grouped.grouped_input_gradient,
        grouped_weight_gradient_=grouped.grouped_weight_gradient_,
        cross_entropy_stats=cross_entropy.cross_entropy_stats,
        cross_entropy_grad_=cross_entropy.cross_entropy_grad_,
        cross_entropy_stats_grad_=cross_entropy.cross_entropy_stats_grad_,
        adamw_=adamw.adamw_,
        square_sum=adamw.square_sum,
        symmetric_product=symmetric.symmetric_product,
        fp8_cast=fp8.fp8_cast,
        fp8_cast_transpose=fp8.fp8_cast_transpose,
        fp8_cast_blocks=fp8_blocks.fp8_cast_blocks,
        fp8_cast_weight_blocks=fp8_blocks.fp8_cast_weight_blocks,
        fp8_block_product=fp8_blocks.fp8_block_product,
        choices=MappingProxyType({"rms_norm": "triton"}),
    )


def plain_kernels() -> Kernels:
    return select_kernels({}, torch.device("cpu"))


def saved_bytes(
    model: ModelConfig,
    mesh: Mesh,
    kernels: Kernels,
    *,
    tokens: tuple[int, int],
    recompute: str,
    dtype: torch.dtype,
    mode: str = "gather",
    keeps: bool = False,
    adapter: AdapterConfig = NO_ADAPTER,
) -> int:
    """Bytes that the middle one of three stages keeps of a micro-batch of `tokens` = (sequence, samples)."""
    sequence = mesh.tp > 1
    owners = (0, 1, 2)
    context = ContextRegion.of(mesh, mode, mesh.tp)
    layout = {"stage": 1, "owners": owners, "sequence": sequence, "keeps": keeps, "context": context}
    stage = Stage(model, mesh, kernels, dtype=dtype, recompute=recompute, adapter=make_adapter(adapter), **layout)
    if adapter.kind != "none":
        for parameter in placed_parameters(stage):
            parameter.requires_grad_(parameter.placement.role == "adapter")
    length, samples = tokens
    positions = stage.positions(length, rows_s=context.rows(length) if mesh.cp > 1 else None)
    tables = (positions.cos, positions.sin)  # shared by all layers
    known = {tensor.untyped_storage()._cdata for tensor in (*stage.parameters(), *stage.buffers(), *tables)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    local = context.part_length(length) // mesh.tp
    x = torch.zeros(local, samples, model.hidden_size, dtype=dtype, device=mesh.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = stage(x, positions)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

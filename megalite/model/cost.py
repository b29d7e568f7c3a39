"""What a model costs: parameters and FLOPs, counted on the built modules, and the peak FLOP/s of a device.

The model is built on the meta device, where parameters have shapes and placements but no values. Start-up log, MFU,
planner, pipeline partition and doctor all read these numbers, so a layer that gains a tensor changes all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from megalite.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from megalite.model.build import Build

FORMULA = "6 * matmul parameters + 12 * layers * heads * head_dim * sequence, causal attention counted full"
FORMULA_HALF = "6 * matmul parameters + 6 * layers * heads * head_dim * sequence, causal attention counted half"

PEAK_FLOPS = MappingProxyType(
    {
        "B200": 2250e12,
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100 NVL": 835e12,
        "H100": 989e12,
        "GH200": 989e12,
        "A100": 312e12,
        "L40S": 362e12,
        "RTX 4090": 165e12,
    }
)
"""Dense bf16 peak from the data sheets, FLOP/s, by a substring of the device name; the first match counts."""


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear layer on one tensor rank; `rows`: its input features are split, not its outputs."""

    inputs: int
    outputs: int
    rows: bool

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer on one tensor rank: its matrices in the order of their use, and all other elements."""

    matrices: tuple[Matrix, ...]
    vectors: int

    @property
    def matrix_elements(self) -> int:
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def elements(self) -> int:
        return self.matrix_elements + self.vectors


@dataclass(frozen=True)
class ModelSizes:
    """Elements on one tensor rank, padding of the vocabulary included; all layers are alike."""

    layer: LayerSizes
    embedding: int
    """The first stage's parameters before its layers."""
    final: int
    """The last stage's parameters after its layers, without the output matrix."""
    output: int
    """The output matrix: a tensor of its own unless tied."""

    def parameters(self, model: ModelConfig) -> int:
        """All parameters, of the layers and both ends."""
        output = 0 if model.tie_embeddings else self.output
        return model.layers * self.layer.elements + self.embedding + self.final + output

    def matmul_parameters(self, model: ModelConfig) -> int:
        """Weights multiplied with every token: all matrices including the output layer, without the embedding."""
        return model.layers * self.layer.matrix_elements + self.output


@functools.lru_cache(maxsize=1024)
def model_sizes(model: ModelConfig, tensor: int = 1, index: int = 0) -> ModelSizes:
    """Sizes on tensor rank `index` of `tensor`, counted on the modules of one layer and both ends."""
    from megalite.model.block import build_block
    from megalite.parallel.linear import RowParallelLinear

    build = _build(model, tensor, index)
    layer = build_block(build, 0)
    matrices = tuple(
        Matrix(weight.shape[1], weight.shape[0], isinstance(module, RowParallelLinear))
        for module in layer.modules()
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    )
    vectors = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() != 2)
    vocabulary, _, _ = build.vocabulary("embedding", (index,), role="embedding")
    final = build.norm("norm", model.hidden_size).weight.numel()
    return ModelSizes(LayerSizes(matrices, vectors), vocabulary.numel(), final, vocabulary.numel())


def _build(model: ModelConfig, tensor: int, index: int) -> Build:
    """The build context of one tensor rank, on the meta device."""
    import torch

    from megalite.kernels import select_kernels
    from megalite.mesh import Group, Mesh
    from megalite.model.build import Build
    from megalite.parallel.collectives import TensorRegion

    meta = torch.device("meta")
    mesh = Mesh(tp=tensor, rank=index, device=meta, make_group=lambda ranks, rank: Group(ranks, rank, None))
    kernels = select_kernels({"default": "reference"}, torch.device("cpu"))
    return Build(dataclasses.replace(model, layers=1), mesh, TensorRegion(mesh.group("tp"), False), kernels)


def parameter_count(model: ModelConfig) -> int:
    """All parameters of the model, exact."""
    return model_sizes(model).parameters(model)


def output_in_layers(model: ModelConfig) -> float:
    """The cost of the output layer, in units of one decoder layer."""
    sizes = model_sizes(model)
    return sizes.output / sizes.layer.matrix_elements


def attention_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """The products QK^T and PV, forward and backward, over the full square of scores."""
    return 12.0 * model.layers * model.heads * model.head_dim * seq_length


def training_flops_per_token(
    model: ModelConfig, seq_length: int, *, head: str = "vocabulary", causal: str = "full"
) -> float:
    """Forward and backward, by `FORMULA`, or with `causal` = "half" by `FORMULA_HALF`; recomputation does not count.

    With `head` = "scalar" one row stands in the place of the output matrix.
    """
    sizes = model_sizes(model)
    weights = sizes.matmul_parameters(model) - (sizes.output - model.hidden_size if head == "scalar" else 0)
    return 6.0 * weights + attention_flops_per_token(model, seq_length) / {"full": 1, "half": 2}[causal]


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None if unknown (megalite does not guess)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)

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

from megalite.config import AdapterConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from megalite.model.build import Build

_ATTENTION = "6 * layers * heads * (head_dim + value_dim) * sequence, causal attention counted full"
FORMULA = f"6 * matmul parameters + {_ATTENTION}"
FORMULA_ADAPTER = f"4 * frozen + 6 * trained matmul parameters + {_ATTENTION}"
FORMULA_HALF = (
    "6 * matmul parameters + 3 * layers * heads * (head_dim + value_dim) * sequence, causal attention counted half"
)

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
    """The weight of one linear layer on one rank; `rows`: its input features are split over the tensor ranks, not its
    outputs; `split`: one of them is.

    `count` matrices of these sizes are held, of which each token uses `used` (experts): over all ranks that share the
    experts, as many tokens come here as go elsewhere.
    """

    inputs: int
    outputs: int
    rows: bool
    split: bool = True
    count: int = 1
    used: int = 1

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs * self.count

    @property
    def active(self) -> int:
        """Elements that one token is multiplied with."""
        return self.inputs * self.outputs * self.used


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer on one tensor rank: its matrices in the order of their use, and all other elements; apart from
    these an adapter's matrices, and the names of the layers (`q_proj`) that it is put around."""

    matrices: tuple[Matrix, ...]
    vectors: int
    adapter: tuple[Matrix, ...] = ()
    adapted: tuple[str, ...] = ()

    @property
    def matrix_elements(self) -> int:
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def active(self) -> int:
        """Elements of the matrices that one token is multiplied with."""
        return sum(matrix.active for matrix in self.matrices)

    @property
    def elements(self) -> int:
        """Of all but an adapter."""
        return self.matrix_elements + self.vectors

    @property
    def adapter_elements(self) -> int:
        return sum(matrix.elements for matrix in self.adapter)


@dataclass(frozen=True)
class ModelSizes:
    """Elements on one tensor rank, padding of the vocabulary included; layers of a kind are alike."""

    layer: LayerSizes
    """Of a layer with experts, where the model has any."""
    embedding: int
    """The first stage's parameters before its layers."""
    final: int
    """The last stage's parameters after its layers, without the output matrix."""
    output: int
    """The output matrix: a tensor of its own unless tied."""
    dense: LayerSizes | None = None
    """Of a layer without experts, where some have."""

    def of_layer(self, model: ModelConfig, number: int) -> LayerSizes:
        """Sizes of this layer."""
        return self.layer if self.dense is None or model.is_sparse(number) else self.dense

    def adapter_parameters(self, model: ModelConfig) -> int:
        """An adapter's, of all layers."""
        return sum(self.of_layer(model, number).adapter_elements for number in range(model.layers))

    def parameters(self, model: ModelConfig) -> int:
        """All parameters but an adapter's, of the layers and both ends."""
        output = 0 if model.tie_embeddings else self.output
        layers = sum(self.of_layer(model, number).elements for number in range(model.layers))
        return layers + self.embedding + self.final + output

    def matmul_parameters(self, model: ModelConfig) -> int:
        """Weights that a token is multiplied with: all matrices including the output layer, without the embedding, and
        of the experts those that one token uses."""
        return sum(self.of_layer(model, number).active for number in range(model.layers)) + self.output


NO_ADAPTER = AdapterConfig()


@functools.lru_cache(maxsize=1024)
def model_sizes(
    model: ModelConfig, tensor: int = 1, index: int = 0, expert: int = 1, adapter: AdapterConfig = NO_ADAPTER
) -> ModelSizes:
    """Sizes on tensor rank `index` of `tensor`, with one of `expert` shares of the experts; counted on the modules of
    one layer of each kind and both ends."""
    from megalite.model.build import make_adapter

    build = dataclasses.replace(meta_build(model, tensor, index, expert), adapter=make_adapter(adapter))
    sparse = model.sparse_layers
    dense = next((layer for layer in range(model.layers) if layer not in sparse), None) if sparse else None
    layer = _layer_sizes(build, sparse[0] if sparse else 0)
    other = None if dense is None else _layer_sizes(build, dense)
    vocabulary, _, _ = build.vocabulary("embedding", (index,), role="embedding")
    final = build.norm("norm", model.hidden_size).weight.numel()
    return ModelSizes(layer, vocabulary.numel(), final, vocabulary.numel(), other)


def _layer_sizes(build: Build, number: int) -> LayerSizes:
    from megalite.model.block import build_block
    from megalite.model.lora import adapted_layers
    from megalite.model.router import Router
    from megalite.parallel.experts import GroupedLinear
    from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
    from megalite.placement import PlacedParameter

    layer, matrices, adapter = build_block(build, number), [], []
    adapted: set[str] = set()
    for module in layer.modules():
        for weight in module.parameters(recurse=False):
            assert isinstance(weight, PlacedParameter)
            if weight.placement.role == "adapter":
                inputs = weight.shape[-1]
                adapter.append(Matrix(inputs, weight.numel() // inputs, rows=False))
                adapted |= set(adapted_layers(box.name for box in weight.placement.boxes))
                continue
            if weight.dim() != 2:
                continue
            outputs, inputs = weight.shape
            if isinstance(module, GroupedLinear):
                experts = build.model.experts // build.mesh.ep
                used = build.model.experts_per_token
                matrices.append(Matrix(inputs, outputs // experts, module.rows, count=experts, used=used))
            else:
                alone = isinstance(module, ColumnParallelLinear) and module.region is not build.region
                split = not isinstance(module, Router) and not alone
                matrices.append(Matrix(inputs, outputs, isinstance(module, RowParallelLinear), split))
    added = sum(matrix.elements for matrix in adapter)
    vectors = sum(parameter.numel() for parameter in layer.parameters()) - added
    vectors -= sum(matrix.elements for matrix in matrices)
    return LayerSizes(tuple(matrices), vectors, tuple(adapter), tuple(sorted(adapted)))


@functools.lru_cache(maxsize=1024)
def layer_matrices(model: ModelConfig, number: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and global shape of every matrix of layer `number`, each projection and each expert for itself."""
    from megalite.model.block import build_block
    from megalite.placement import placed_parameters

    parameters = placed_parameters(build_block(meta_build(model), number))
    boxes = (box for parameter in parameters if parameter.decays for box in parameter.placement.boxes)
    return tuple({box.name: box.shape for box in boxes}.items())


def meta_build(model: ModelConfig, tensor: int = 1, index: int = 0, expert: int = 1) -> Build:
    """The build context of one tensor rank, on the meta device."""
    import torch

    from megalite.kernels import select_kernels
    from megalite.mesh import Group, Mesh
    from megalite.model.build import Build
    from megalite.parallel.collectives import TensorRegion

    meta = torch.device("meta")
    mesh = Mesh(ep=expert, tp=tensor, rank=index, device=meta, make_group=lambda ranks, rank: Group(ranks, rank, None))
    kernels = select_kernels({"default": "reference"}, torch.device("cpu"))
    return Build(dataclasses.replace(model, layers=1), mesh, TensorRegion(mesh.group("tp"), False), kernels)


def parameter_count(model: ModelConfig) -> int:
    """All parameters of the model, exact."""
    return model_sizes(model).parameters(model)


def output_in_layers(model: ModelConfig) -> float:
    """The cost of the output layer, in units of one decoder layer (their mean, where they differ)."""
    sizes = model_sizes(model)
    return sizes.output * model.layers / (sizes.matmul_parameters(model) - sizes.output)


def attention_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """The products QK^T and PV, forward and backward, over the full square of scores."""
    return 6.0 * model.layers * model.heads * (model.head_dim + model.value_dim) * seq_length


def training_flops_per_token(
    model: ModelConfig,
    seq_length: int,
    *,
    head: str = "vocabulary",
    causal: str = "full",
    adapter: AdapterConfig = NO_ADAPTER,
) -> float:
    """Forward and backward, by `FORMULA`, or with `causal` = "half" by `FORMULA_HALF`; recomputation does not count.

    With `head` = "scalar" one row stands in the place of the output matrix. Beside an `adapter`, frozen weights have no
    gradients of their own (`FORMULA_ADAPTER`).
    """
    sizes = model_sizes(model, adapter=adapter)
    weights = sizes.matmul_parameters(model) - (sizes.output - model.hidden_size if head == "scalar" else 0)
    products = 6.0 * weights
    if adapter.kind != "none":
        products = 4.0 * weights + 6.0 * sizes.adapter_parameters(model)
    return products + attention_flops_per_token(model, seq_length) / {"full": 1, "half": 2}[causal]


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None if unknown (megalite does not guess)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)

"""CPU seconds of sparse layers, as ratios within one process: grouped against dense products, megalite against
transformers (if installed). Ratios of CPU time survive a busy machine; absolute numbers would not.

python -m benchmarks.experts [--repeat 5]
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from benchmarks.clock import cpu_seconds
from megalite.config import ModelConfig
from megalite.kernels import grouped, select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.families import family_of_model
from megalite.model.init import initialise


def grouped_against_dense(repeat: int) -> dict[str, float]:
    """Dense product's seconds over those of the grouped one of the same FLOPs, each with both gradients."""
    ratios = {}
    for experts, rows, inputs, outputs in ((8, 4096, 512, 1024), (8, 1024, 512, 1024), (64, 4096, 256, 512)):
        x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
        weight, total = torch.randn(experts, outputs, inputs), torch.zeros(experts, outputs, inputs)
        ends = torch.rand(experts).softmax(0).mul(rows).long().cumsum(0)
        ends[-1] = rows
        one, whole = weight[0].contiguous(), torch.zeros(outputs, inputs)

        def many(
            x: Tensor = x, grad: Tensor = grad, weight: Tensor = weight, total: Tensor = total, ends: Tensor = ends
        ) -> None:
            grouped.grouped_product(x, weight, ends)
            grouped.grouped_input_gradient(grad, weight, ends)
            grouped.grouped_weight_gradient_(total, grad, x, ends)

        def dense(x: Tensor = x, grad: Tensor = grad, one: Tensor = one, whole: Tensor = whole) -> None:
            torch.mm(x, one.t())
            torch.mm(grad, one)
            whole.addmm_(grad.t(), x)

        ratios[f"{experts} experts, {rows} rows, {inputs} x {outputs}"] = cpu_seconds(dense, repeat) / cpu_seconds(
            many, repeat
        )
    return ratios


def against_transformers(repeat: int) -> float:
    """transformers' CPU seconds over megalite's, forward and backward of a small Mixtral in fp32."""
    import transformers

    model = ModelConfig(
        layers=4,
        hidden_size=256,
        heads=8,
        kv_heads=4,
        vocab_size=4096,
        max_positions=512,
        experts=8,
        experts_per_token=2,
        expert_ffn_hidden_size=512,
    )
    stage = Stage(model, Mesh(), select_kernels({}, torch.device("cpu")))
    initialise(stage, 1)
    written = family_of_model(model, "mixtral").write_config(model)
    config = transformers.AutoConfig.for_model(written.pop("model_type"), **written, experts_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(4096, (2, 512))
    labels = ids.roll(-1, 1)

    def ours() -> None:
        hidden = stage(ids, stage.positions(ids.shape[1]))
        stage.loss(hidden, labels, 1 / ids.numel()).backward()

    def other() -> None:
        theirs(ids, labels=ids).loss.backward()

    return cpu_seconds(other, repeat) / cpu_seconds(ours, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    print(json.dumps({"dense / grouped": grouped_against_dense(repeat)}, indent=1))
    try:
        print(json.dumps({"transformers / megalite": against_transformers(repeat)}))
    except ImportError:
        print("transformers is not installed")


if __name__ == "__main__":
    main()

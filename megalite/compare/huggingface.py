"""Side B as a Hugging Face model: the same global batch through transformers, recorded under the same names.

One process, forward and backward of one step; transformers has no optimizer of its own to compare. Modules of a
Hugging Face model are called as megalite calls them, so hooks on their names suffice. Micro-batches and the one
normalisation by the count of labels in the global batch are megalite's.

S tokens of a sequence, B samples of a micro-batch, F features, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalite.compare.pieces import BACKWARD, FORWARD, INPUT, LOSS, NORM, START, Piece, Port, Sampling, bits_of
from megalite.compare.pieces import write_pieces as write
from megalite.config import Config, load_config
from megalite.data.batch import Batch
from megalite.data.batches import Batches
from megalite.errors import FINISHED, UNUSABLE, UserError
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.model.sharded import DTYPES
from megalite.runtime import World, choose_device
from megalite.train.inputs import open_data, resolve_tokenizer

_WITH_INPUT = (".o_proj", ".down_proj")


def load_model(folder: Path, config: Config, device: torch.device) -> nn.Module:
    """The model, in the precision of the recipe. Raises `UserError`."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"a Hugging Face model needs transformers ({error}); pip install transformers") from None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES[config.train.precision], attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from None
    model.config.use_cache = False
    trained: nn.Module = model.to(device).train()
    return trained


class ModelRecorder:
    """Records one step of a Hugging Face model; `pieces` as of `megalite.compare.record.Recorder`."""

    def __init__(self, model: nn.Module, sampling: Sampling, length: int, samples: int) -> None:
        self.model, self.sampling, self.pieces = model, sampling, list[Piece]()
        self._length, self._samples, self._first = length, samples, 0
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList):
                module.register_forward_pre_hook(self._before(name))
                module.register_forward_hook(self._after(name))

    def weights(self) -> None:
        """The weights that were loaded."""
        for name, parameter in self._parameters():
            self._whole(name, "weight", 0, "initial weights", START, parameter)

    def step(self, batches: list[Batch]) -> None:
        """Forward and backward of a global batch, whose micro-batches have the same size."""
        units = sum(int((batch.labels_BS != IGNORE_INDEX).sum()) for batch in batches)
        total = 0.0
        for number, batch in enumerate(batches):
            self._first = number * len(batch.tokens_BS)
            for name, ids_BS in (("tokens", batch.tokens_BS), ("labels", batch.labels_BS)):
                self._tokens(name, "input", "data", INPUT, ids_BS.unsqueeze(-1))
            logits_BSV = self.model(input_ids=batch.tokens_BS).logits.float()
            labels_N = batch.labels_BS.flatten()
            losses = functional.cross_entropy(
                logits_BSV.flatten(0, 1), labels_N, ignore_index=IGNORE_INDEX, reduction="sum"
            )
            loss = losses.double() / max(1, units)
            loss.backward()
            total += loss.item()
        for name in ("lm_head.loss", "loss"):
            self._whole(name, "loss", 1, "objective", LOSS, torch.tensor([total], dtype=torch.float64))
        square = 0.0
        for name, parameter in self._parameters():
            if parameter.grad is not None:
                square += parameter.grad.double().square().sum().item()
                self._whole(name, "gradient", 1, "backward", BACKWARD, parameter.grad)
        norm = torch.tensor([square**0.5], dtype=torch.float64)
        self._whole("grad_norm", "grad_norm", 1, "gradient norm", NORM, norm)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())  # a tied one is listed once

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                return None
            x_BSF = args[0]
            if name.endswith(_WITH_INPUT) or name.split(".")[-1].isdecimal():
                self._tokens(f"{name}.input", "activation", f"{name} forward", FORWARD, x_BSF)
            if not x_BSF.requires_grad:
                return None
            alias = x_BSF.view_as(x_BSF)
            alias.register_hook(self._gradient_of(f"{name}.input"))
            return (alias, *args[1:])

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values_BSF = output[0] if isinstance(output, tuple) else output
            if isinstance(values_BSF, Tensor):
                self._tokens(name, "activation", f"{name} forward", FORWARD, values_BSF)
                if values_BSF.requires_grad:
                    values_BSF.register_hook(self._gradient_of(name))

        return hook

    def _gradient_of(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self._tokens(name, "activation_gradient", f"{name} backward", BACKWARD, gradient)

    def _tokens(self, name: str, kind: str, operation: str, phase: int, values_BSF: Tensor) -> None:
        count = min(len(values_BSF), self._samples - self._first)
        if values_BSF.dim() != 3 or count <= 0:
            return
        shape = (self._length, self._samples, values_BSF.shape[-1])
        values_SBF = values_BSF[:count].transpose(0, 1)
        self._keep(name, kind, 1, operation, phase, shape, (0, self._first, 0), values_SBF)

    def _whole(self, name: str, kind: str, step: int, operation: str, phase: int, values: Tensor) -> None:
        self._keep(name, kind, step, operation, phase, tuple(values.shape), (0,) * values.dim(), values)

    def _keep(
        self,
        name: str,
        kind: str,
        step: int,
        operation: str,
        phase: int,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
        values: Tensor,
    ) -> None:
        port = Port(name, kind, step, operation, (float(phase),))
        kept, corner = self.sampling.take(name, shape, offset, values)
        bits = bits_of(values, shape, offset) if self.sampling.hashed else None
        self.pieces.append(Piece(port, 0, shape, offset, tuple(values.shape), kept, corner, bits=bits))


def record_model(order: dict[str, Any]) -> None:
    """Load the model, make the step, write the recording."""
    config, eod = resolve_tokenizer(load_config(order["recipe"], order["overrides"]))
    device = choose_device(config, World())
    model = load_model(Path(order["model"]), config, device)
    train: Any = open_data(config)[0]
    samples = config.samples_at(0)
    end = eod if config.data.mask_end_of_document else None
    with Batches(train, micro_batch_size=config.train.micro_batch_size, device=device, end_of_document=end) as batches:
        recorder = ModelRecorder(model, Sampling(**order["sampling"]), config.train.seq_length, samples)
        recorder.weights()
        recorder.step(batches.next_batch(0, samples))
    write(Path(order["folder"]) / "rank_00000", recorder.pieces)


def main(order_file: str) -> int:
    order = json.loads(Path(order_file).read_text())
    try:
        record_model(order)
        return FINISHED
    except UserError as error:
        (Path(order["folder"]) / "refused_0").write_text(str(error))
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

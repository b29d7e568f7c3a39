"""PEFT's form of an adapter: `adapter_config.json` and `adapter_model.safetensors`, both ways.

The tensors have megalite's names with `base_model.model.` before them; a scorer's score lies beside them. Anything in
the configuration that changes what the adapter computes, and that megalite does not, is refused.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.huggingface.names import read_json
from megalite.checkpoint.source import Shapes, TensorSource, check_inside
from megalite.checkpoint.tensor_file import TensorFile
from megalite.config import AdapterConfig
from megalite.errors import UserError
from megalite.files import atomic_file, write_atomically
from megalite.model.decoder import SCORE
from megalite.model.lora import adapted_layers, pair_names
from megalite.placement import Region

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

_USED = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights")
_WITHOUT_EFFECT = (
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_config"),
    *("megatron_core", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
)
"""Which layers have an adapter is read from the tensors; the rest is of training, or of features refused elsewhere."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""


def is_peft(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def adapter_of(config: Mapping[str, Any], where: Path, targets: Sequence[str]) -> AdapterConfig:
    """The adapter that an `adapter_config.json` describes. Raises UserError for what megalite does not compute."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type = {reprlib.repr(config.get('peft_type'))}; megalite reads LORA")
    for field, value in sorted(config.items()):
        if field not in (*_USED, *_WITHOUT_EFFECT) and value and (field, value) != ("bias", "none"):
            raise UserError(f"{where}: {field} = {reprlib.repr(value)} is not supported; merge the adapter with PEFT")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights = {reprlib.repr(start)} has changed the base; merge the adapter with PEFT"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{where}: r = {reprlib.repr(rank)} is not a rank; use 1 or more")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise UserError(f"{where}: lora_alpha = {reprlib.repr(alpha)} is not a scale; use a number above 0")
    return AdapterConfig("rslora" if config.get("use_rslora") else "lora", rank, float(alpha), tuple(targets))


class PeftSource:
    """The tensors of a PEFT directory under megalite's names, with the interface of `TensorSource`.

    `base` is the directory of the model that they belong to, `config` their adapter. Raises UserError.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        where = self.directory / CONFIG
        config = read_json(where)
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not os.path.isdir(base):
            raise UserError(
                f"{where}: base_model_name_or_path = {reprlib.repr(base)} is not a directory here; set it to the "
                "model's"
            )
        self.base = Path(base)
        if not os.path.lexists(self.directory / WEIGHTS):
            raise UserError(f"{self.directory} holds no {WEIGHTS}; save the adapter again as safetensors")
        self._file = TensorFile(self.directory / WEIGHTS)
        try:
            self._names = {name.removeprefix(_PREFIX): name for name in self._file.tensors}
            self.config = adapter_of(config, where, adapted_layers(self._names))
        except BaseException:
            self.close()
            raise

    def require_weights(self, base: Shapes) -> None:
        """Check that every tensor belongs to a weight of the base, or is a scorer's score. Raises UserError."""
        known = {pair for name in base for pair in pair_names(name)}
        for name, stored in self._names.items():
            if name not in known and name != SCORE:
                raise UserError(f"{self._file.path}: {stored!r} belongs to no weight of {self.base}")

    def shapes(self) -> Shapes:
        return {name: self._file.tensors[stored].shape for name, stored in self._names.items()}

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        region, shape = Region(tuple(offset), tuple(size)), self.shapes().get(name)
        if shape is None:
            raise UserError(f"{self._file.path} has no tensor {name!r}")
        check_inside(region, name, shape, self.directory)
        return region.of(self._file.read(self._names[name]), (0,) * len(shape)).contiguous()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PeftSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_peft(
    directory: Path, source: TensorSource, names: Sequence[str], adapter: AdapterConfig, base: str, dtype: torch.dtype
) -> int:
    """Write the two files; `names` are megalite's of the tensors in `source`, `base` the directory of the model.
    Returns the bytes of the tensors."""
    from safetensors.torch import save

    tensors = {}
    for name in sorted(names):
        shape = source.shapes()[name]
        tensors[_PREFIX + name] = source.read(name, (0,) * len(shape), shape).to(dtype).contiguous()
    with atomic_file(directory / WEIGHTS) as file:
        file.write(save(tensors, {"format": "pt"}))
    scores = SCORE in names
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.kind == "rslora",
        "target_modules": list(adapted_layers(names)),
        "modules_to_save": ["score"] if scores else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    write_atomically(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(tensor.nbytes for tensor in tensors.values())

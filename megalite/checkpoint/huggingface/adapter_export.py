"""Export of an adapter alone, to a PEFT directory: small, for use beside the model that it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from megalite.checkpoint.huggingface.export import KEPT, Export, appearing, tokenizer_files
from megalite.checkpoint.huggingface.names import CONFIG, read_json
from megalite.checkpoint.huggingface.peft import WEIGHTS, write_peft
from megalite.checkpoint.huggingface_config import NAMES
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.weights import adapter_config_of
from megalite.config import build_config
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.model.decoder import CRITIC
from megalite.model.families import family_of_model
from megalite.model.lora import pair_names


def holds_adapter(reader: CheckpointReader) -> bool:
    """Whether a checkpoint holds an adapter without its base."""
    return bool(reader.manifest.bases)


def export_adapter(reader: CheckpointReader, directory: Path, dtype: str = "auto", *, role: str = "policy") -> Export:
    """Write `directory` (new, or empty) from the checkpoint of an adapter. Raises UserError.

    `dtype` `auto` is float32, as the checkpoint has it.
    """
    adapter = adapter_config_of(reader)
    if adapter.kind not in ("lora", "rslora"):
        raise UserError(f"{reader.directory}: adapter.kind = {adapter.kind!r} is not known to PEFT")
    if role == "critic":
        raise UserError("--role critic: a critic's adapter is not exported; leave it out for the policy's")
    names = [name for name in reader.shapes() if not name.startswith(CRITIC)]
    _require_names(reader, names)
    chosen = {"auto": torch.float32, **{name: dtype for dtype, name in NAMES.items()}}[dtype]
    with appearing(directory) as partial:
        size = write_peft(partial, reader, names, adapter, reader.manifest.bases[""]["source"], chosen)
        for name, content in tokenizer_files(reader).items():
            write_atomically(partial / name, content)
    return Export(len(names), size, (WEIGHTS,))


def _require_names(reader: CheckpointReader, names: list[str]) -> None:
    """Raise a `UserError` for an adapted weight that Hugging Face's family has under another name or in a fused one."""
    model = build_config({"model": reader.manifest.model}).model
    base = Path(reader.manifest.bases[""]["source"])
    described = [path for path in (base / CONFIG, base / KEPT / CONFIG) if path.is_file()]
    family = family_of_model(model, read_json(described[0]).get("model_type", "") if described else "")
    own = {tensor.name for tensor in family.tensors(model) if [part.name for part in tensor.parts] == [tensor.name]}
    known = {pair for name in own for pair in pair_names(name)}
    for name in names:
        if ".lora_" in name and name not in known:
            raise UserError(f"{family.architectures[0]} has no weight of its own for {name}; merge the adapter instead")

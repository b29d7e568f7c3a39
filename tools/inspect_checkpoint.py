"""Look into a checkpoint: step, model, tensors, files; with --verify every byte is compared with its checksum.

python tools/inspect_checkpoint.py runs/small --verify
python tools/inspect_checkpoint.py runs/small/checkpoints/step_00000100 --tensors
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.tensor_file import DTYPES
from megalite.errors import UserError, exit_on_user_error

SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Options:
    """What a checkpoint holds, and whether it is intact. Exit code 2 if it is not."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, or a run directory, of which the newest complete checkpoint is taken."""
    verify: bool = False
    """Read everything and compare it with its checksums."""
    tensors: bool = False
    """List every tensor: shape, dtype of each kind, number of pieces."""
    json: bool = False
    """Print one JSON line instead."""


def summary(manifest: Manifest) -> dict[str, object]:
    """The numbers that are shown."""
    kinds = {
        kind: sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries.values())
        for kind, entries in manifest.index.items()
    }
    return {
        "step": manifest.step,
        "updates": manifest.updates,
        "parameters": sum(math.prod(shape) for shape in manifest.shapes().values()),
        "tensors": len(manifest.shapes()),
        "bytes": kinds,
        "files": len(manifest.files),
        "file_bytes": sum(size for size, _ in manifest.files.values()),
        "extras": sorted(manifest.extras),
        "model": manifest.model,
        "state": manifest.state,
    }


def show(manifest: Manifest, directory: Path, options: Options) -> None:
    facts = summary(manifest)
    if options.json:
        print(json.dumps({"checkpoint": str(directory), **facts}))
        return
    print(f"{directory}: step {facts['step']}, {facts['updates']} optimizer updates")
    print(f"  {facts['parameters']:,} parameters in {facts['tensors']} tensors")
    print("  " + ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in facts["bytes"].items()))  # type: ignore[attr-defined]
    print(f"  {facts['files']} files of tensors; further files: {', '.join(sorted(manifest.extras)) or 'none'}")
    for title in ("model", "state"):
        print(
            f"  {title}: " + ", ".join(f"{name} = {_short(value)}" for name, value in getattr(manifest, title).items())
        )
    if options.tensors:
        for name, shape in sorted(manifest.shapes().items()):
            held = {kind: entries[name] for kind, entries in manifest.index.items()}
            listed = ", ".join(f"{kind} {entry.dtype} in {len(entry.pieces)}" for kind, entry in held.items())
            print(f"  {name} {list(shape)}: {listed}")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with CheckpointReader(options.checkpoint) as reader:
        show(reader.manifest, reader.directory, options)
        if not options.verify:
            return
        faults = reader.verify()
        if faults:
            more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
            raise UserError(f"{reader.directory} is damaged: " + "; ".join(faults[:SHOWN_FAULTS] + more))
    if not options.json:
        print("  verified: every tensor and file matches its checksum")


if __name__ == "__main__":
    main()

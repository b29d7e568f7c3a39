"""Look into a checkpoint: step, model, tensors, files; with --verify every byte is compared with its checksum.

python tools/inspect_checkpoint.py runs/small --verify
python tools/inspect_checkpoint.py runs/small/checkpoints/step_00000100 --tensors
"""

import argparse
import json
import math
from pathlib import Path

from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.tensor_file import DTYPES
from megalite.cli import Parser, file_path, program
from megalite.errors import UserError
from megalite.observe.formatting import counted

SHOWN_FAULTS = 20


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "Exit code 2 where the checkpoint is damaged.")
    add = parser.add_argument
    add(
        "checkpoint",
        type=file_path,
        metavar="CHECKPOINT_DIR",
        help="a checkpoint, or a run directory: its newest",
    )
    add("--verify", action="store_true", help="read everything and compare it with its checksums")
    add("--tensors", action="store_true", help="list every tensor: shape, dtype of each kind, number of pieces")
    add("--json", action="store_true", help="print one JSON line instead")
    return parser.parse_args()


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


def show(manifest: Manifest, directory: Path, options: argparse.Namespace) -> None:
    facts = summary(manifest)
    if options.json:
        print(json.dumps({"checkpoint": str(directory), **facts}))
        return
    print(f"{directory}: step {facts['step']}, {counted(manifest.updates, 'optimizer update')}")
    print(f"  {facts['parameters']:,} parameters in {counted(len(manifest.shapes()), 'tensor')}")
    print("  " + ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in facts["bytes"].items()))  # type: ignore[attr-defined]
    further = ", ".join(sorted(manifest.extras)) or "none"
    print(f"  {counted(len(manifest.files), 'file')} of tensors; further files: {further}")
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


@program
def main() -> None:
    options = parse()
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

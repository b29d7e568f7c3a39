"""Between megalite's checkpoints, Hugging Face directories and adapters, streaming: 70B take a few GB of memory.

python tools/convert_checkpoint.py to-hf CHECKPOINT_DIR HF_DIR [--dtype auto|float32|bfloat16|float16] [--shard-gb 5]
                                                                [--role policy|critic] [--stacked-experts]
python tools/convert_checkpoint.py from-hf HF_DIR CHECKPOINT_DIR
python tools/convert_checkpoint.py merge ADAPTER_CHECKPOINT CHECKPOINT_DIR

CHECKPOINT_DIR is, for `to-hf`, a run directory (its newest checkpoint) or one checkpoint inside it; `from-hf` and
`merge` make a run directory with `checkpoints/step_00000000` and a `config.toml` to train on from. An adapter alone
becomes a PEFT directory; `merge` takes either and adds it to its base. The output must not exist, or be empty; it
appears complete or not at all.
"""

from __future__ import annotations

import argparse
import sys
import time

from megalite.checkpoint.huggingface.adapter_export import export_adapter, holds_adapter
from megalite.checkpoint.huggingface.export import Export, Progress, export_huggingface
from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface_config import NAMES
from megalite.checkpoint.merge_adapter import merge_adapter
from megalite.checkpoint.source import CheckpointReader
from megalite.cli import Parser, file_path, number, program
from megalite.errors import UserError
from megalite.observe.formatting import counted


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("direction", choices=("to-hf", "from-hf", "merge"))
    parser.add_argument("source", type=file_path, metavar="FROM")
    parser.add_argument("target", type=file_path, metavar="TO")
    parser.add_argument("--dtype", default="auto", choices=("auto", *NAMES.values()), help="to-hf: of the weights")
    parser.add_argument(
        "--shard-gb", type=number(1e-9, 1e9), default=5.0, metavar="GB", help="to-hf: size of one file (default 5)"
    )
    parser.add_argument(
        "--role", default="policy", choices=("policy", "critic"), help="to-hf: which model of a run of ppo"
    )
    parser.add_argument(
        "--stacked-experts", action="store_true", help="to-hf: all experts of a layer in one tensor, not one for each"
    )
    options = parser.parse_args(argv)
    given = (options.dtype, options.shard_gb, options.role, options.stacked_experts)
    if options.direction != "to-hf" and given != ("auto", 5.0, "policy", False):
        raise UserError(
            "--dtype, --shard-gb, --role and --stacked-experts belong to to-hf; "
            f"{options.direction} keeps the dtype of the weights"
        )
    return options


def progress_line() -> Progress | None:
    """A line that is written over, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{100 * done / total:5.1f} %  {what[:60]:<60}{end}")
        sys.stderr.flush()

    return show


def export(reader: CheckpointReader, options: argparse.Namespace) -> Export:
    """Write a model, or an adapter alone, in Hugging Face's form."""
    if holds_adapter(reader):
        return export_adapter(reader, options.target, options.dtype, role=options.role)
    return export_huggingface(
        reader,
        options.target,
        options.dtype,
        int(options.shard_gb * 10**9),
        progress_line(),
        role=options.role,
        stacked_experts=options.stacked_experts,
    )


@program
def main() -> None:
    options, started = parse(), time.monotonic()
    if options.direction == "to-hf":
        with CheckpointReader(options.source) as reader:
            result = export(reader, options)
            came_from = reader.directory
        size = f"{result.weight_bytes / 1e9:.3g} GB in {counted(len(result.files), 'file')}"
        written = f"{counted(result.tensors, 'tensor')}, {size}"
    elif options.direction == "merge":
        config = merge_adapter(options.source, options.target, progress_line())
        came_from = options.source
        written = f"{counted(config.model.layers, 'layer')}, whole weights"
    else:
        config = import_huggingface(options.source, options.target, progress_line())
        came_from = options.source
        written = f"{counted(config.model.layers, 'layer')}, train with {options.target / 'config.toml'}"
    print(f"{options.target}: {written}, from {came_from} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()

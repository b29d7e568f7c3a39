"""Merging token files without loading them, and the provenance of the result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.verify import index_problem
from megalite.errors import UserError


def merge(
    prefixes: Sequence[str | Path], output: str | Path, provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the documents of several token files, in the given order, as one; returns its description.

    Memory is bounded whatever the sizes. Raises `UserError` if an input is unusable, dtypes differ, or the output is
    one of the inputs.
    """
    inputs = [IndexedDataset(prefix) for prefix in prefixes]
    if not inputs:
        raise UserError(f"{output}: nothing to merge; give at least one input prefix")
    if Path(f"{output}.bin").resolve() in {Path(f"{prefix}.bin").resolve() for prefix in prefixes}:
        raise UserError(f"{output}: the output is one of the inputs; choose another output prefix")
    for dataset in inputs:
        if problem := index_problem(dataset):  # the merged index is built from the lengths, which must be right
            raise UserError(f"{problem}; the file is damaged: write it again")
        if dataset.dtype != inputs[0].dtype:
            raise UserError(
                f"{dataset.prefix}.idx: token dtype {dataset.dtype} differs from {inputs[0].dtype} of"
                f" {inputs[0].prefix}.idx; tokenize both with the same vocabulary"
            )
    writer = IndexedWriter(output, inputs[0].dtype)
    try:
        for dataset in inputs:
            writer.add_dataset(dataset)
        return writer.finish(provenance)
    finally:
        writer.abort()


def merged_provenance(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """What to note beside a merged file: what all inputs' descriptions agree on, and the inputs.

    Raises `UserError` if they were made with different tokenizers: their ids mean different things.
    """
    described = [dataset.description() for dataset in datasets]
    for dataset, description in zip(datasets, described, strict=True):
        ours, theirs = (entry.get("tokenizer", {}).get("sha256") for entry in (described[0], description))
        if ours and theirs and ours != theirs:
            raise UserError(
                f"{dataset.prefix}.json: made with another tokenizer than {datasets[0].prefix}"
                f" (sha256 {theirs[:12]} and {ours[:12]}); tokenize both with the same one"
            )
    shared = dict(described[0].items()) if described else {}
    for description in described[1:]:
        shared = {key: value for key, value in shared.items() if description.get(key) == value}
    inputs = [
        {"name": Path(dataset.prefix).name, "tokens": dataset.tokens.size, "fingerprint": dataset.fingerprint()}
        for dataset in datasets
    ]
    return {**shared, "merged_from": inputs}

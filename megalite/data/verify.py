"""Full verification of a token file: what opening it does not look at, because that costs a walk over all of it."""

import numpy as np

from megalite.data.indexed import INT64, IndexedDataset, file_paths, file_sha256


def verify(dataset: IndexedDataset, vocab_size: int | None = None) -> list[str]:
    """Walk the whole token file in bounded memory and return every problem found, one line each; empty means sound.

    Checked: lengths are not negative, offsets are the running sum of the lengths, documents are in order, ids are below
    `vocab_size` where given and never negative, and the checksums of `PREFIX.json` where there is one.
    """
    bin_path, idx_path, json_path = file_paths(dataset.prefix)
    problems = [problem] if (problem := index_problem(dataset)) else []
    if not problems and (bad := _first_bad_token(dataset, vocab_size)):
        problems.append(f"{bin_path}: {bad}")
    description = dataset.description()
    for key, path in (("bin_sha256", bin_path), ("idx_sha256", idx_path)):
        if key in description and description[key] != (found := file_sha256(path)):
            problems.append(f"{path}: sha256 {found} differs from {key} {description[key]} in {json_path}")
    if description.get("fingerprint", "") not in ("", dataset.fingerprint()):
        problems.append(f"{json_path}: fingerprint {description['fingerprint']} is not that of the files beside it")
    return problems


def index_problem(dataset: IndexedDataset) -> str:
    """The first thing that is wrong with the index, or nothing; one walk over it in bounded memory."""
    idx_path = file_paths(dataset.prefix)[1]
    offset = start = 0
    for piece, offsets in zip(dataset.pieces("lengths"), dataset.pieces("offsets"), strict=True):
        lengths = piece.astype(INT64)
        if lengths.min() < 0:
            where = int(np.argmin(lengths))
            return f"{idx_path}: sequence {start + where} has length {lengths[where]}"
        ends = offset + np.cumsum(lengths) * dataset.dtype.itemsize
        wrong = offsets != ends - lengths * dataset.dtype.itemsize
        if wrong.any():
            where = start + int(np.argmax(wrong))
            return f"{idx_path}: sequence {where} does not begin where the one before it ends"
        offset, start = int(ends[-1]), start + lengths.size
    document, previous = -1, 0
    for boundaries in dataset.pieces("boundaries"):
        # compared, not subtracted: a difference of two wild numbers may overflow and look right
        falls = boundaries < np.concatenate(([previous], boundaries[:-1]))
        if falls.any():
            return f"{idx_path}: document {document + int(np.argmax(falls))} ends before it begins"
        document, previous = document + boundaries.size, int(boundaries[-1])
    return ""


def _first_bad_token(dataset: IndexedDataset, vocab_size: int | None) -> str:
    limit = np.iinfo(dataset.dtype).max if vocab_size is None else vocab_size - 1
    start = 0
    for piece in dataset.pieces("tokens"):
        if piece.max() > limit or piece.min() < 0:
            where = start + int(np.flatnonzero((piece > limit) | (piece < 0))[0])
            sequence = int(np.searchsorted(dataset.offsets, where * dataset.dtype.itemsize, side="right")) - 1
            return (
                f"document {dataset.document_of(sequence)}: token id {dataset.tokens[where]}"
                f" is outside the vocabulary of {limit + 1}"
            )
        start += piece.size
    return ""

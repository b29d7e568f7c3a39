"""Types of the C++ extension `_index.cpp`; arrays must have exactly the dtypes documented where they are called."""

import numpy as np

def build_sample_index(lengths: np.ndarray, document_index: np.ndarray, seq_length: int, rows: np.ndarray) -> None: ...
def build_blend(
    weights: np.ndarray,
    limits: np.ndarray,
    counts: np.ndarray,
    first: int,
    dataset_index: np.ndarray,
    sample_index: np.ndarray,
) -> None: ...
def gather(
    tokens: np.ndarray,
    kind: str,
    item_bytes: int,
    offsets: np.ndarray,
    lengths: np.ndarray,
    document_index: np.ndarray,
    begin_document: int,
    begin_offset: int,
    out: np.ndarray,
    positions: np.ndarray,
    documents: np.ndarray,
) -> tuple[int, int]: ...

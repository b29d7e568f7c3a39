"""Types of the C++ extension `_bpe.cpp`."""

import numpy as np

class BytePairs:
    def __init__(self, byte_ids: np.ndarray, merges: np.ndarray, whole: dict[bytes, int], capacity: int) -> None: ...
    def encode(self, words: list[str]) -> bytes: ...

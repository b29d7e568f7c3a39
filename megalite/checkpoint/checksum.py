"""The checksum of a checkpoint's bytes, known by the name that stands in its manifest.

New checkpoints use XXH3 with 64 bits (https://xxhash.com), which a core computes about six times as fast as zlib's
CRC-32, the checksum of checkpoints of version 1. Both find damage; neither is meant to stop a forger. Where the package
xxhash is missing, new checkpoints use CRC-32 and say so in their manifest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

try:
    import xxhash
except ModuleNotFoundError:  # a machine with torch alone, such as a rented GPU, can train and save all the same
    xxhash = None  # type: ignore[assignment]

from megalite.errors import UserError


@dataclass(frozen=True)
class Checksum:
    """A checksum by `name`; called with contiguous bytes it returns `digits` hexadecimal digits, without the GIL."""

    name: str
    digits: int
    _compute: Callable[[bytes | memoryview], int] | None

    @property
    def available(self) -> bool:
        """Whether this machine can compute it."""
        return self._compute is not None

    def __call__(self, data: bytes | memoryview) -> str:
        assert self._compute is not None, self.name
        return f"{self._compute(data):0{self.digits}x}"


CRC32 = Checksum("crc32", 8, zlib.crc32)
XXH3_64 = Checksum("xxh3_64", 16, None if xxhash is None else xxhash.xxh3_64_intdigest)
_KNOWN = {checksum.name: checksum for checksum in (CRC32, XXH3_64)}


def find_checksum(name: object, where: object) -> Checksum:
    """The checksum that the file `where` names; raises `UserError` if it is unknown or cannot be computed here."""
    checksum = _KNOWN.get(name) if isinstance(name, str) else None
    if checksum is None:
        raise UserError(
            f"{where} has checksums of the kind {str(name)[:40]!r}, this megalite knows {', '.join(_KNOWN)}: use the "
            "version that it came from"
        )
    if not checksum.available:
        raise UserError(f"{where} has checksums of the kind {checksum.name}, which need a package: pip install xxhash")
    return checksum


def newest() -> Checksum:
    """The checksum for new checkpoints: the fastest that this machine can compute."""
    return XXH3_64 if XXH3_64.available else CRC32


def agreed(names: Iterable[str]) -> Checksum:
    """The checksum that all ranks write with, given the `newest` of each of them."""
    return XXH3_64 if set(names) == {XXH3_64.name} else CRC32

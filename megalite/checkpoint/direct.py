"""Writing large files past the page cache.

A write through the page cache costs a copy of every byte into memory that the kernel must find first, at the expense of
whatever was cached there; the disk waits meanwhile, and `fsync` waits for the disk afterwards. Direct writes
(`O_DIRECT`) take the bytes from aligned blocks of the process instead: while one block is on its way to the disk, the
next is filled. Where the file system has no direct writes, the same blocks go through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

_BLOCK = 16 << 20
"""Bytes of a write: large enough for any disk to be at its full speed."""
_BLOCKS = 3
"""One is filled, one is written, one is ready."""
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 4096
"""Addresses, lengths and positions are multiples of the disk's sectors, which are no larger than this."""


def write_direct(descriptor: int, views: Iterable[memoryview]) -> None:
    """Write bytes one after the other from the beginning of an empty file; raises OSError. `fsync` is the caller's."""
    _set_direct(descriptor, True)
    blocks = [_new_block() for _ in range(_BLOCKS)]
    under_way: list[Future[None]] = []
    position = size = 0
    with ThreadPoolExecutor(1) as disk:
        for number, filled in enumerate(_fill(views, blocks)):
            size += filled
            padded = -(-filled // _ALIGNMENT) * _ALIGNMENT
            block = blocks[number % _BLOCKS][:padded]
            block[filled:] = 0
            under_way.append(disk.submit(_write_block, descriptor, block.data, position))
            position += padded
            if len(under_way) == _BLOCKS:  # the next block to be filled is the oldest that was given away
                under_way.pop(0).result()
        for block_written in under_way:
            block_written.result()
    if size < position:
        os.ftruncate(descriptor, size)


def _new_block() -> np.ndarray:
    """`_BLOCK` bytes of memory, in huge pages where there are some.

    A request to a disk has so many pieces of contiguous memory at most; of scattered small pages it is a quarter as
    long as the disk would take it.
    """
    memory = mmap.mmap(-1, _BLOCK + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + _BLOCK]


def _fill(views: Iterable[memoryview], blocks: list[np.ndarray]) -> Iterator[int]:
    """Copy the views into the blocks in turn; yields, when a block is full or the last, how many bytes it holds."""
    number = filled = 0
    for view in views:
        source = np.frombuffer(view, dtype=np.uint8)
        taken = 0
        while taken < len(source):
            count = min(_BLOCK - filled, len(source) - taken)
            blocks[number % _BLOCKS][filled : filled + count] = source[taken : taken + count]
            taken, filled = taken + count, filled + count
            if filled == _BLOCK:
                yield filled
                number, filled = number + 1, 0
    if filled:
        yield filled


def _set_direct(descriptor: int, on: bool) -> None:
    """Turn direct writes on or off; where they are not supported they stay off."""
    direct = getattr(os, "O_DIRECT", 0)  # Linux alone has it
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _write_block(descriptor: int, block: memoryview, position: int) -> None:
    done = 0
    while done < len(block):
        try:
            done += os.pwrite(descriptor, block[done:], position + done)
        except OSError as error:
            # Some file systems refuse direct writes only here, and after a short write the rest may not be aligned.
            if error.errno != errno.EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
                raise
            _set_direct(descriptor, False)

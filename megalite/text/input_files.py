"""Expansion of `--input` to files: names, globs and directories, each visited once, always terminating.

Files are identified by device and inode. However many names refer to one (symbolic or hard links, two spellings, the
blobs and snapshots of a Hugging Face cache), it is read once; a directory is entered once, so a link to one of its
parents cannot loop.
"""

import fnmatch
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalite.errors import UserError
from megalite.text.formats import named_format

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_MAGIC = frozenset("*?[")

Identity = tuple[int, int]


def expand_inputs(patterns: Sequence[str | Path], option: str = "--input") -> list[Path]:
    """The files matched by names, globs (including `**`) and directories (recursive, without hidden files), each once.

    The order is that of the patterns, sorted within each, and so does not depend on the file system. Of several names
    of one file the first is taken, or the first that tells the format.

    Raises:
        UserError: a pattern matches no file, or what it matches cannot be read as a file; `option` is named.
    """
    files: dict[Identity, Path] = {}
    for pattern in map(str, patterns):
        found = False
        for name in _names(pattern, option):
            identity = _identity(name, option)
            if identity is None:
                continue
            found = True
            path = Path(os.path.realpath(name) if name.startswith(("/dev/", "/proc/")) else name)
            known = files.setdefault(identity, path)
            if named_format(known)[0] == "unknown" != named_format(path)[0]:
                files[identity] = path
        if not found:
            what = "is a directory without files" if os.path.isdir(pattern) else "matches no file"
            raise UserError(f"{option} {pattern}: {what}; give files, directories or globs such as 'corpus/*.jsonl.gz'")
    return list(files.values())


def _names(pattern: str, option: str) -> list[str]:
    if os.path.isdir(pattern):
        return _walk(pattern, ["**"], option)
    if os.path.lexists(pattern) or not _MAGIC & set(pattern):
        return [pattern] if os.path.lexists(pattern) else []
    return _walk("/" if pattern.startswith("/") else "", [part for part in pattern.split("/") if part], option)


def _identity(name: str, option: str) -> Identity | None:
    """Device and inode of a regular file that can be read; None for a directory.

    Raises:
        UserError: it is something else. A pipe can be read only once, while the programs read their input in parts,
            again where they go on after an interruption, and some of them in several passes.
    """
    try:
        name.encode()
        status = os.stat(name)
    except UnicodeEncodeError:
        raise UserError(f"{option} {os.fsencode(name)!r}: the name is not UTF-8; rename the file") from None
    except OSError as error:
        what = "is a link to a file that is not there" if os.path.islink(name) else f"cannot be read ({error.strerror})"
        raise UserError(f"{option} {name}: {what}; mend it or leave it out") from error
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        return None
    if kind != stat.S_IFREG:
        raise UserError(
            f"{option} {name}: is {_KINDS.get(kind, 'no file')}, and only files can be read; write it to a file first"
        )
    if not os.access(name, os.R_OK):
        raise UserError(f"{option} {name}: cannot be read (permission denied); change its mode or leave it out")
    return status.st_dev, status.st_ino


def _walk(root: str, parts: Sequence[str], option: str) -> list[str]:
    """What the components of a glob match below `root`, sorted; `**` stands for any number of directories.

    A directory is searched once for each component, so the work is bounded whatever its links are. Directories come
    before links to directories: a file that has a name of its own below `root` is found by that name.
    """
    found: list[str] = []
    seen: set[tuple[int, int, int]] = set()
    pending, through_links = deque([(root, 0)]), deque[tuple[str, int]]()
    while pending or through_links:
        folder, index = (pending or through_links).popleft()
        status = os.stat(folder or ".")
        if (status.st_dev, status.st_ino, index) in seen:
            continue
        seen.add((status.st_dev, status.st_ino, index))
        part, last = parts[index], index == len(parts) - 1
        if part == "**" and not last:
            pending.append((folder, index + 1))
        for name in _entries(folder, part, option):
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                if part == "**" or not last:
                    queue = through_links if os.path.islink(path) else pending
                    queue.append((path, index if part == "**" else index + 1))
            elif last:
                found.append(path)
    return sorted(found)


def _entries(folder: str, part: str, option: str) -> Iterator[str]:
    """The names in `folder` that match one component of a glob; hidden ones only if it begins with a dot."""
    if not _MAGIC & set(part):
        if os.path.lexists(os.path.join(folder, part)):
            yield part
        return
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be read ({error.strerror}); mend it or leave it out") from error
    if part == "**" and {"blobs", "snapshots"} <= set(names):
        names = ["snapshots"]  # a Hugging Face cache: beside them lie the same files under hashes, and its notes
    for name in names:
        hidden = name.startswith(".") and not part.startswith(".")
        if not hidden and (part == "**" or fnmatch.fnmatchcase(name, part)):
            yield name

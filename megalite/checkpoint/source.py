"""Sources of weights: any box of any global tensor, however it is stored.

`TensorSource` is the interface that loading needs; `CheckpointReader` reads megalite's own checkpoints. A source is
global: it knows nothing about layouts. `load_weights` fills the boxes of a model's placements from it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megalite.checkpoint.directory import find_checkpoint
from megalite.checkpoint.manifest import MANIFEST, WEIGHT, Manifest, Piece, piece_key
from megalite.checkpoint.tensor_file import DTYPES, DamagedFile, TensorFile, tensor_bytes
from megalite.errors import UserError
from megalite.model.decoder import CRITIC, OUTPUT, SCORE, Stage
from megalite.model.init import initialise_parameter
from megalite.model.shapes import local_shapes
from megalite.model.sharded import ShardedModel
from megalite.placement import PlacedParameter, Region, placed_parameters

_AHEAD = 4
"""Pieces that are read before they are checked. One thread reads, for disks and page caches are fastest from beginning
to end; ranks read beside each other."""

Shapes = Mapping[str, tuple[int, ...]]


class TensorSource(Protocol):
    """Global tensors by name. Reading what does not exist or is damaged raises `UserError`."""

    def shapes(self) -> Shapes:
        """The global shape of every tensor."""
        ...

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset`, contiguous on the CPU, in the dtype it is stored in (fp32, bf16 or fp16)."""
        ...


def needed(found: Shapes, expected: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The tensors of a source without those of other roles: a critic beside the model, and the other kind of head."""
    names = set(expected)
    other_head = {OUTPUT} if any(name.endswith(SCORE) for name in names) else {SCORE}
    return {
        name: shape
        for name, shape in found.items()
        if name in names or (not name.startswith(CRITIC) and name not in other_head)
    }


class Prefixed:
    """A source whose tensors are named as those of a model with a prefix; a critic begins from a plain model so."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source, self._prefix = source, prefix
        self.directory = getattr(source, "directory", type(source).__name__)

    def shapes(self) -> Shapes:
        return {self._prefix + name: shape for name, shape in self._source.shapes().items()}

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._source.read(name.removeprefix(self._prefix), offset, size)


@dataclass(frozen=True)
class Target:
    """A region of a global tensor and the tensor of the same size (any device, any dtype) to read it into."""

    name: str
    region: Region
    destination: Tensor


class CheckpointReader:
    """One complete megalite checkpoint, given its own directory or a run directory (whose newest is opened).

    Every piece is verified against its checksum before any of it is used. `manifest` holds everything but the tensors.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = find_checkpoint(Path(directory))
        self.manifest = Manifest.from_file(self.directory / MANIFEST)
        self._files: dict[str, TensorFile] = {}

    @property
    def tokenizer(self) -> Path | None:
        """The checkpoint's tokenizer file, if it has one."""
        for name in ("tokenizer.model", "tokenizer.json"):
            if name in self.manifest.extras:
                return self.directory / name
        return None

    def shapes(self) -> Shapes:
        return self.manifest.shapes()

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        return self.read_kind(WEIGHT, name, offset, size)

    def read_kind(self, kind: str, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box of a tensor of the given kind (`weight`, `exp_avg`, `exp_avg_sq`)."""
        entries = self.manifest.index.get(kind, {})
        if name not in entries:
            raise UserError(f"{self.directory} holds no {kind} of {name}")
        box = torch.empty(tuple(size), dtype=DTYPES[entries[name].dtype])
        self.read_into({kind: [Target(name, Region(tuple(offset), tuple(size)), box)]})
        return box

    def read_into(self, targets: Mapping[str, Iterable[Target]]) -> None:
        """Fill many boxes, given by kind; every piece is read and verified once, roughly in file order.

        After an error the boxes are partly filled.
        """
        by_key: dict[tuple[str, str], list[Target]] = {}
        for kind, boxes in targets.items():
            for target in boxes:
                by_key.setdefault((kind, target.name), []).append(target)
        jobs: list[tuple[str, int, str, str, Piece, list[Target]]] = []
        for (kind, name), wanted in by_key.items():
            entry = self.manifest.index.get(kind, {}).get(name)
            if entry is None:
                raise UserError(f"{self.directory} holds no {kind} of {name}")
            for target in wanted:
                check_inside(target.region, name, entry.shape, self.directory)
            for piece in entry.pieces:
                touched = [target for target in wanted if target.region.overlap(_region(piece)) is not None]
                if touched:
                    stored = self._file(piece.file).entry(piece_key(kind, name, piece.offset))
                    jobs.append((piece.file, stored.begin, kind, name, piece, touched))
        jobs.sort(key=lambda job: job[:2])
        under_way: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as beside:  # one reads the files from their beginnings on, the other checks
            for _, _, kind, name, piece, touched in jobs:
                # In the common case a whole piece goes into one target and can be read in place.
                room = _room_for(piece, touched[0], DTYPES[self.manifest.index[kind][name].dtype])
                content = self._read(kind, name, piece, room)
                left = touched if room is None else touched[1:]
                under_way.append(beside.submit(self._deliver, kind, name, piece, content, left))
                if len(under_way) > _AHEAD:
                    under_way.popleft().result()
            for delivered in under_way:
                delivered.result()

    def _deliver(self, kind: str, name: str, piece: Piece, content: Tensor, targets: Sequence[Target]) -> None:
        """Verify one piece and copy it to its targets."""
        self._check(kind, name, piece, content)
        for target in targets:
            _copy_overlap(content, piece, target)

    def verify(self) -> list[str]:
        """Read everything; returns the faults found, one line each."""
        faults: list[str] = []
        for kind, entries in self.manifest.index.items():
            for name, entry in entries.items():
                for piece in entry.pieces:
                    _collect(faults, functools.partial(self._verify, kind, name, piece))
        for name in self.manifest.extras:
            _collect(faults, functools.partial(self.extra, name))
        return list(dict.fromkeys(faults))

    def extra(self, name: str) -> bytes:
        """A further file of the checkpoint (config.toml, tokenizer files), verified."""
        size, checksum = self.manifest.extras[name]
        path = self.directory / name
        try:
            data = path.read_bytes() if path.stat().st_size == size else b""
        except OSError as error:
            raise DamagedFile(f"{path}: {error.strerror}") from None
        if len(data) != size or self.manifest.checksum(data) != checksum:
            raise DamagedFile(f"{path} does not match the checksum in {MANIFEST}: damaged")
        return data

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            file = TensorFile(self.directory / name, self.manifest.checksum)
            size, header_checksum = self.manifest.files[name]
            if file.header_checksum != header_checksum:
                raise DamagedFile(f"{file.path}: the header does not match its checksum: damaged")
            if file.size != size:
                raise DamagedFile(f"{file.path} has {file.size} bytes, {size} were written: damaged")
            self._files[name] = file
        return self._files[name]

    def _read(self, kind: str, name: str, piece: Piece, room: Tensor | None = None) -> Tensor:
        """The content of a piece, not verified yet; read into `room` if given."""
        file, key = self._file(piece.file), piece_key(kind, name, piece.offset)
        stored, dtype = file.entry(key), DTYPES[self.manifest.index[kind][name].dtype]
        if stored.shape != piece.size or stored.dtype != dtype:
            raise DamagedFile(
                f"{file.path}: {key} is {stored.dtype} {list(stored.shape)}, the manifest says {dtype} "
                f"{list(piece.size)}: damaged"
            )
        content = torch.empty(piece.size, dtype=dtype) if room is None else room
        file.read_bytes(stored.begin, content)
        return content

    def _check(self, kind: str, name: str, piece: Piece, content: Tensor) -> None:
        if self.manifest.checksum(tensor_bytes(content)) != piece.checksum:
            key = piece_key(kind, name, piece.offset)
            raise DamagedFile(f"{self._file(piece.file).path}: {key} does not match its checksum: damaged")

    def _verify(self, kind: str, name: str, piece: Piece) -> None:
        self._check(kind, name, piece, self._read(kind, name, piece))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _collect(faults: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except UserError as error:
        faults.append(str(error))


def check_inside(region: Region, name: str, shape: tuple[int, ...], where: Path) -> None:
    """Raise a `UserError` unless the region is inside the tensor `name` of `where`."""
    if not region.inside(shape):
        raise UserError(
            f"{where}: {name} has shape {list(shape)}, which has no box of size {list(region.size)} at "
            f"{list(region.offset)}"
        )


def _region(piece: Piece) -> Region:
    return Region(piece.offset, piece.size)


def _room_for(piece: Piece, target: Target, dtype: torch.dtype) -> Tensor | None:
    """The part of the target that a piece fills, if the piece can be read into it directly."""
    room, region = target.destination, _region(piece)
    if room.dtype != dtype or room.device.type != "cpu" or room.dim() == 0 or target.region.overlap(region) != region:
        return None
    room = region.of(room, target.region.offset)
    return room if room.is_contiguous() else None


def _copy_overlap(content: Tensor, piece: Piece, target: Target) -> None:
    if shared := _region(piece).overlap(target.region):
        shared.of(target.destination, target.region.offset).copy_(shared.of(content, piece.offset))


def compare_shapes(expected: Shapes, found: Shapes, where: str, what: str = "the model") -> None:
    """Raise a `UserError` that names how the tensors in `where` differ from what `what` needs."""
    differences = [f"{_plain(name)} is missing" for name in sorted(expected.keys() - found.keys())]
    differences += [f"{_plain(name)} is not part of {what}" for name in sorted(found.keys() - expected.keys())]
    differences += [
        f"{_plain(name)} has shape {list(found[name])}, {what} needs {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if differences:
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise UserError(f"{where} does not fit {what}: {'; '.join(differences[:3])}{more}")


def _plain(name: str) -> str:
    """A name from a file, made safe for a one-line message."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


@torch.no_grad()
def load_weights(stages: Iterable[Stage], source: TensorSource, whole_model: Shapes | None = None) -> None:
    """Fill every parameter of the stages from a source; padding becomes zero.

    `whole_model` are the shapes of the whole model (`model_shapes`); without it, tensors that these stages do not hold
    are assumed to belong to other ranks, unless the stages are the whole model. Raises `UserError` for missing or
    unexpected tensors and for different shapes.
    """
    stages = list(stages)
    _require_fit(stages, source, whole_model)
    for stage in stages:
        for parameter in placed_parameters(stage):
            if parameter.tied_to is None:
                _load_parameter(parameter, source)


@torch.no_grad()
def fill_model(model: ShardedModel, source: TensorSource) -> None:
    """`load_weights` for a model whose parameters may be sharded (ZeRO-3)."""
    _require_fit(list(model.stages.values()), source, None)
    model.fill(lambda parameter: _load_parameter(parameter, source))


@torch.no_grad()
def fill_base(model: ShardedModel, source: TensorSource) -> None:
    """Fill the frozen weights of a model with an adapter from a source of plain weights; what that may lack (the load
    of experts) gets its initial values. Raises `UserError`."""
    expected, whole = model.base_shapes(), model.all_shapes()
    if model.prefix and not any(name.startswith(model.prefix) for name in source.shapes()):
        source = Prefixed(source, model.prefix)
    found = source.shapes()
    fresh = model.fresh_shapes().keys() - found.keys()
    trained = whole.keys() - expected.keys()
    compare_shapes(
        {name: shape for name, shape in expected.items() if name not in fresh},
        {name: shape for name, shape in needed(found, whole).items() if name not in trained},
        _describe(source),
    )

    def write(parameter: PlacedParameter) -> None:
        if any(box.name in fresh for box in parameter.placement.boxes):
            initialise_parameter(parameter, model.config.run.seed)
        else:
            _load_parameter(parameter, source)

    model.fill(write, trained=False)


def _require_fit(stages: list[Stage], source: TensorSource, whole_model: Shapes | None) -> None:
    here = local_shapes(stages)
    found = needed(source.shapes(), here)
    # A rank may hold both ends and not the middle, or all layers and not all experts.
    whole = bool(stages) and len(stages) == len(stages[0].owners) and stages[0].build.mesh.ep == 1
    if whole_model is None and not whole:
        found = {name: shape for name, shape in found.items() if name in here}
    compare_shapes(whole_model or here, found, _describe(source))


def _load_parameter(parameter: PlacedParameter, source: TensorSource) -> None:
    parameter.zero_()
    for box in parameter.placement.boxes:
        box.view(parameter).copy_(source.read(box.name, box.offset, box.size))


def _describe(source: TensorSource) -> str:
    return str(getattr(source, "directory", type(source).__name__))

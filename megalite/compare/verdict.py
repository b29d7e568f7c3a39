"""Which tensor differs first: each difference held against the noise of the same elements.

Two measures of a box, each against its own noise: the root of the mean square, which a few wrong elements raise, and a
low quantile, which a small shift of all elements raises (the lower quartile of the differences against the median of
the noise). A box differs if one of them exceeds `FACTOR` times its noise. For the mean square that is the noise of the
box's own elements, or of the whole tensor where that is larger.

Three cases of their own:

- numbers (loss, norm) have no elements to average over, so the noise of the tensors before them counts as well;
- after an update, elements whose gradient is next to zero may be moved either way by a full step: the largest
  `FLIPS` of the differences of a weight are left out, on both sides;
- tokens, labels, the learning rate, and initial weights of one precision must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalite.compare.gather import Key, Tensor, by_name, gather, ports
from megalite.compare.pieces import MASTER, Piece, Port
from megalite.compare.rounding import EPSILON

FACTOR = 10.0
"""How many times its noise a difference is. Over 37 clean pairs with each of three seeds the largest was 6.4."""

FLIPS = 0.02
"""The share of a weight's elements that may have gone the other way."""

_NUMBERS = ("loss", "grad_norm")
_EXACT = ("input", "lr")
_NORM_TOLERANCE = 1e-5
"""Of a gradient norm against the norm of the gradients themselves, which is one sum in float64."""


@dataclass(frozen=True)
class Measured:
    """A tensor's largest difference: sizes are relative to the root mean square of side A's elements.

    `ratio` is the difference as a multiple of what is allowed; the tensor differs above 1. `rank`, `offset` and `size`
    say which rank of side `side` holds the box with the largest ratio.
    """

    port: Port
    difference: float
    noise: float
    ratio: float
    rank: int
    side: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    same_bits: bool
    remark: str = ""

    @property
    def differs(self) -> bool:
        return not self.ratio <= 1.0

    def summary(self) -> dict[str, Any]:
        """As the JSON line has it."""
        return {
            "name": self.port.name,
            "kind": self.port.kind,
            "step": self.port.step,
            "rank": self.rank,
            "difference": _finite(self.difference),
            "noise": _finite(self.noise),
            "operation": self.port.operation,
            "side": self.side,
            "shape": list(self.shape),
            "offset": list(self.offset),
            "size": list(self.size),
            **({"remark": self.remark} if self.remark else {}),
        }


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """All tensors that both sides have, in the order of execution; `alone` counts those that one side has."""

    measured: list[Measured] = field(default_factory=list)
    alone: int = 0

    @property
    def first(self) -> Measured | None:
        return next((each for each in self.measured if each.differs), None)

    def summary(self) -> dict[str, Any]:
        first = self.first
        return {
            "equal": first is None,
            "first": None if first is None else first.summary(),
            "compared": len(self.measured),
            "same_bits": sum(each.same_bits for each in self.measured),
            "on_one_side": self.alone,
        }


def compare(
    a: Sequence[Piece],
    b: Sequence[Piece],
    noise: Sequence[Sequence[Piece]],
    *,
    precision: str,
    same_precision: bool,
    same_names: bool = True,
) -> Verdict:
    """Side B against side A, whose recordings with random rounding are `noise`.

    `precision` is the coarser one of the two sides; initial weights are compared bit by bit if it is that of both.
    `same_names`: a weight or a gradient that B lacks is a difference, as it is not where B names its tensors itself.
    """
    ours, theirs, noisy = by_name(a), by_name(b), [by_name(run) for run in noise]
    judge = _Judge(EPSILON[precision], same_precision)
    measured = []
    for key in ports(ours):
        if key in theirs:
            runs = [gather(run[key]) for run in noisy if key in run]
            measured.append(judge.measure(gather(ours[key]), gather(theirs[key]), runs))
        elif same_names and key[1] in ("weight", "gradient"):
            measured.append(_lacking(gather(ours[key]), ours[key], "b lacks it"))
    return Verdict(measured, len(ours.keys() ^ theirs.keys()))


def _lacking(a: Tensor, pieces: Sequence[Piece], remark: str) -> Measured:
    """A difference without size: something that one side does not have, or in another shape."""
    first, shape = pieces[0], a.pieces[0].shape
    return Measured(a.port, math.inf, 0.0, math.inf, first.rank, "b", shape, first.offset, first.size, False, remark)


class _Judge:
    """Measures tensor after tensor of a step; remembers what numbers made of them are held against."""

    def __init__(self, epsilon: float, same_precision: bool) -> None:
        self.epsilon, self.same_precision = epsilon, same_precision
        self._relative, self._tokens = 0.0, 1
        self._squares: dict[tuple[str, int], float] = {}
        self._gradient_noise = 0.0
        self._step = -1

    def measure(self, a: Tensor, b: Tensor, runs: Sequence[Tensor]) -> Measured:
        if a.port.step != self._step:
            self._step, self._squares, self._gradient_noise = a.port.step, {}, 0.0
        same = a.whole.shape == b.whole.shape and np.array_equal(a.whole, b.whole, equal_nan=a.whole.dtype.kind == "f")
        if a.bits is not None and b.bits is not None:
            same = a.bits == b.bits
        shapes = b.pieces[0].shape, a.pieces[0].shape
        if shapes[0] != shapes[1]:
            return _lacking(a, b.pieces, f"its shape is {shapes[0]} in b, {shapes[1]} in a")
        if a.whole.shape != b.whole.shape or not (a.covered.all() and b.covered.all()):
            return _lacking(a, b.pieces, "one side lacks a part of it")
        size = _rms(a.whole)
        noises = [run.whole.astype(np.float64) - a.whole for run in runs if run.whole.shape == a.whole.shape]
        worst = max(self._boxes(a, b, noises), key=lambda each: each[0])
        ratio, piece, side, difference, noise = worst
        self._remember(a, b, noises)
        scale = size or 1.0
        remark = ""
        if a.port.kind == "grad_norm" and (remark := self._norm_remark(a, b)):
            ratio, side, piece = math.inf, "b", b.pieces[0]
        shape, box = a.pieces[0].shape, (piece.offset, piece.size)
        return Measured(
            a.port, difference / scale, noise / scale, ratio, piece.rank, side, shape, *box, bool(same), remark
        )

    def _boxes(
        self, a: Tensor, b: Tensor, noises: Sequence[np.ndarray]
    ) -> Iterator[tuple[float, Piece, str, float, float]]:
        """(ratio, piece, side, difference, noise) of each rank's box of side B, and of side A's replicas."""
        kind = a.port.kind
        exact = kind in _EXACT or (kind == "weight" and a.port.step == 0 and self.same_precision)
        trimmed = FLIPS if kind == "weight" or a.port.name.startswith(f"{MASTER}: ") else 0.0
        overall = _Spread.of(noises, trimmed)
        for side, tensor in (("b", b), ("a", a)):
            for piece in tensor.pieces:
                if not piece.values.size:
                    continue
                values, reference = piece.values, a.box(piece)
                gap = _gap(values, reference)
                if not gap.any():
                    yield 0.0, piece, side, 0.0, overall.rms
                    continue
                own = _Spread.of([noise[_place(piece)] for noise in noises], trimmed)
                least = self._least(a, reference)
                found = _Spread.of([gap], trimmed)
                if exact:
                    yield math.inf, piece, side, found.rms, 0.0
                    continue
                rms = max(own.rms, overall.rms, least * _rms(reference), self._number_noise(a))
                median = max(own.median, least * float(np.median(np.abs(reference)))) if noises else rms
                if a.whole.size == 1:
                    median = rms
                ratio = max(_ratio(found.rms, FACTOR * rms), _ratio(found.quartile, FACTOR * median))
                yield ratio, piece, side, found.rms, rms

    def _least(self, a: Tensor, reference: np.ndarray) -> float:
        """The least relative noise: a quarter of a unit in the last place of what the tensor is kept in."""
        fp32 = a.port.kind in ("gradient", "optimizer_state", *_NUMBERS)
        return (EPSILON["fp32"] if fp32 else self.epsilon) / 4

    def _number_noise(self, a: Tensor) -> float:
        """What the noise of the tensors before a number makes of it."""
        if a.port.kind == "loss":  # a mean over tokens, whose errors are their own
            return self._relative * _rms(a.whole) / math.sqrt(self._tokens)
        return self._gradient_noise if a.port.kind == "grad_norm" else 0.0

    def _remember(self, a: Tensor, b: Tensor, noises: Sequence[np.ndarray]) -> None:
        kind = a.port.kind
        if kind == "activation" and noises and _rms(a.whole):
            self._relative = _Spread.of(noises, 0.0).rms / _rms(a.whole)
            self._tokens = math.prod(a.pieces[0].shape[:2])
        elif kind == "gradient":
            for side, tensor in (("a", a), ("b", b)):
                square = float(np.square(tensor.whole.astype(np.float64)).sum())
                self._squares[side, a.port.step] = self._squares.get((side, a.port.step), 0.0) + square
            if noises:
                # of independent errors of the gradients, whose projections on the gradient add up in squares
                spread = _Spread.of(noises, 0.0).rms
                self._gradient_noise = max(self._gradient_noise, spread * math.sqrt(a.whole.size) / 4)

    def _norm_remark(self, a: Tensor, b: Tensor) -> str:
        """What is wrong with side B's norm, where side A's is the norm of its gradients."""
        held = {side: math.sqrt(self._squares.get((side, self._step), 0.0)) for side in ("a", "b")}
        norms = {"a": float(a.whole[0]), "b": float(b.whole[0])}
        right = {side: math.isclose(norms[side], held[side], rel_tol=_NORM_TOLERANCE) for side in ("a", "b")}
        if right["a"] and not right["b"]:
            return f"b says {norms['b']:.6g}, and its gradients have the norm {held['b']:.6g}"
        return ""


@dataclass(frozen=True)
class _Spread:
    """Root mean square, median and lower quartile of the sizes of some elements, over several runs."""

    rms: float
    median: float
    quartile: float

    @staticmethod
    def of(runs: Sequence[np.ndarray], trimmed: float) -> _Spread:
        """`trimmed` is the share of the largest elements of each run that is left out."""
        if not runs or not runs[0].size:
            return _Spread(0.0, 0.0, 0.0)
        sizes = [_trimmed(np.abs(run).ravel(), trimmed) for run in runs]
        rms = math.sqrt(sum(_rms(each) ** 2 for each in sizes) / len(sizes))
        ranked = [np.partition(each, (each.size // 4, each.size // 2)) for each in sizes]
        quartile, median = (max(float(each[each.size // part]) for each in ranked) for part in (4, 2))
        return _Spread(rms, median, quartile)


def _trimmed(sizes: np.ndarray, share: float) -> np.ndarray:
    drop = math.ceil(share * sizes.size) if sizes.size >= 16 and share else 0
    return np.partition(sizes, sizes.size - drop - 1)[: sizes.size - drop] if drop else sizes


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.square(values.astype(np.float64)).mean())) if values.size else 0.0


def _gap(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Elementwise difference in fp64: 0 where both are the same, also the same infinity or no number."""
    with np.errstate(invalid="ignore"):
        gap = values.astype(np.float64) - reference
    same = (values == reference) | (np.isnan(values.astype(np.float64)) & np.isnan(reference.astype(np.float64)))
    return np.where(same, 0.0, np.where(np.isnan(gap), np.inf, gap))


def _ratio(found: float, allowed: float) -> float:
    return 0.0 if found == 0.0 else found / allowed if allowed > 0.0 else math.inf


def _place(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(piece.corner, piece.values.shape))


__all__ = ["FACTOR", "Key", "Measured", "Verdict", "compare"]

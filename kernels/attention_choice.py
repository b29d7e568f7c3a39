"""`kernels.attention = auto` on a GPU: measure the candidates once for every kind of call, then keep to the fastest.

A kind of call is shapes, dtype, layout, mask options and whether gradients are wanted. A candidate that refuses a call,
or runs out of memory on it, is left out for that kind. What was chosen, and how far behind the others were, is logged
once. The times are also kept in a file, by device, versions and the kernels' own text, so that the next run on such a
machine measures nothing and chooses the same.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flash_attention import Documents, attention_sdpa, fusable
from .layout import next_power_of_two

Attention = Callable[..., Any]
Times = dict[str, float | None]
"""Candidate -> seconds, or None where it refused the call."""

logger = logging.getLogger("megalite.kernels")

REPEATS = 5


def sdpa_backends() -> dict[str, Attention]:
    """Torch's fused attention with one backend each: the one it takes by itself is often not the fastest on Hopper."""

    def only(backend: SDPBackend) -> Attention:
        def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            causal, softcap = options.get("causal", True), options.get("softcap")
            if not fusable(q.shape[0], k.shape[0], causal, softcap, options.get("return_lse", False)):
                raise RuntimeError("not a call that the fused operators do")
            with sdpa_kernel(backend):
                return attention_sdpa(q, k, v, **options)

        return call

    return {"sdpa-flash": only(SDPBackend.FLASH_ATTENTION), "sdpa-cudnn": only(SDPBackend.CUDNN_ATTENTION)}


def seconds(candidate: Attention, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> float:
    """Best time of one call, with its backward where gradients are wanted; the first two calls are not counted."""
    device, trains = tensors[0].device, wants_gradient(tensors)
    best = float("inf")
    for repeat in range(REPEATS + 2):
        leaves = [x.detach().requires_grad_(trains and x.requires_grad) for x in tensors]
        _synchronize(device)
        start = time.perf_counter()
        with torch.enable_grad():
            result = candidate(*leaves, **options)
            out = result[0] if isinstance(result, tuple) else result
            if out.requires_grad:
                torch.autograd.backward(out, torch.ones_like(out))
        _synchronize(device)
        if repeat >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wants_gradient(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def kind_of(tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call's speed depends on. Without gradients lengths count as the next power of two: generation grows its
    keys with every token, and must not measure anew each time."""
    q, k = tensors[:2]
    trains = wants_gradient(tensors)
    lengths: tuple[int, ...] = (q.shape[0], k.shape[0])
    if not trains:
        order = (lengths[0] > lengths[1]) - (lengths[0] < lengths[1])
        lengths = (*map(next_power_of_two, lengths), order)
    plain = sorted((name, isinstance(x, Tensor | Documents) or x) for name, x in options.items())
    layout = tuple(x.is_contiguous() for x in tensors)
    return (lengths, tuple(q.shape[1:]), k.shape[2], str(q.dtype), layout, tuple(plain), trains)


def environment(device: torch.device) -> str:
    """Whose times these are: device, versions, and a digest of the kernels' own text."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "absent"
    sources = sorted(Path(__file__).parent.glob("flash_attention*.py"))
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, cuda {torch.version.cuda}, triton {triton}, kernels {digest}"


def cache_file() -> Path | None:
    """`megalite/attention.json` in the user's cache directory; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "megalite" / "attention.json"


class MeasuredTimes:
    """Times by kind of call, kept in a JSON file for one environment.

    A file that cannot be read or written costs a measurement and a line in the log, never the run.
    """

    def __init__(self, path: Path | None, environment: str) -> None:
        self.path, self.environment = path, environment

    def get(self, kind: str, candidates: Mapping[str, Attention]) -> Times | None:
        """What was measured for `kind` with exactly these candidates, or None."""
        times = self._read().get(self.environment, {}).get(kind)
        if not isinstance(times, dict) or times.keys() != candidates.keys():
            return None
        numbers = [x for x in times.values() if x is not None]
        good = numbers and all(isinstance(x, float) and math.isfinite(x) and x > 0 for x in numbers)
        return times if good else None

    def put(self, kind: str, times: Times) -> None:
        if self.path is None:
            return
        document = self._read()  # another process may have written meanwhile; the last of two at once wins
        document[self.environment] = {**document.get(self.environment, {}), kind: times}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".attention-", delete=False) as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.path)
        except OSError as error:
            logger.warning("kernels.attention: measured times are not kept: %s", error)
            self.path = None

    def _read(self) -> dict[str, dict[str, Any]]:
        if self.path is None:
            return {}
        try:
            document = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("kernels.attention: %s is not readable, measuring anew: %s", self.path, error)
            return {}
        if not isinstance(document, dict):
            logger.warning("kernels.attention: %s holds no table of times, measuring anew", self.path)
            return {}
        return {name: kinds for name, kinds in document.items() if isinstance(kinds, dict)}


def fastest(
    candidates: Mapping[str, Attention], kept: MeasuredTimes, measure: Callable[..., float] = seconds
) -> Attention:
    """An attention that measures `candidates` at the first call of each kind and from then on uses the fastest."""
    chosen: dict[Any, Attention] = {}

    def call(*tensors: Tensor, **options: Any) -> Any:
        kind = kind_of(tensors, options)
        if kind not in chosen:
            chosen[kind] = _choose(str(kind), tensors, options)
        return chosen[kind](*tensors, **options)

    def _choose(kind: str, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> Attention:
        times = kept.get(kind, candidates)
        source = "measured earlier" if times else "times"
        if times is None:
            times = {name: _time(name, candidate, tensors, options) for name, candidate in candidates.items()}
            if all(x is None for x in times.values()):
                shapes = [tuple(x.shape) for x in tensors]
                raise RuntimeError(f"no attention takes shapes {shapes}; tried {list(candidates)}")
            kept.put(kind, times)
        numbers = {name: x for name, x in times.items() if x is not None}
        best = min(numbers, key=lambda name: numbers[name])
        ratios = ", ".join(f"{name} {value / numbers[best]:.2f}" for name, value in numbers.items())
        logger.info("kernels.attention: %s for q %s (%s: %s)", best, tuple(tensors[0].shape), source, ratios)
        return candidates[best]

    def _time(name: str, candidate: Attention, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> float | None:
        try:
            return measure(candidate, tensors, options)
        except RuntimeError as error:  # a backend that refuses this call; torch.OutOfMemoryError is one, too
            logger.debug("kernels.attention: %s left out: %s", name, error)
            return None

    return call

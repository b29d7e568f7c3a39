"""`kernels.attention = auto` on a GPU: measure the candidates once for every kind of call, then keep to the fastest.

A kind of call is shapes, dtype, mask options and whether gradients are wanted. A candidate that refuses a call, or runs
out of memory on it, is left out for that kind. What was chosen, and how far behind the others were, is logged once.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flash_attention import attention_sdpa

Attention = Callable[..., Any]

logger = logging.getLogger("megalite.kernels")

REPEATS = 5


def sdpa_backends() -> dict[str, Attention]:
    """Torch's fused attention with one backend each: the one it takes by itself is often not the fastest on Hopper."""

    def only(backend: SDPBackend) -> Attention:
        def call(*tensors: Tensor, **options: Any) -> Any:
            with sdpa_kernel(backend):
                return attention_sdpa(*tensors, **options)

        return call

    return {"sdpa-flash": only(SDPBackend.FLASH_ATTENTION), "sdpa-cudnn": only(SDPBackend.CUDNN_ATTENTION)}


def seconds(candidate: Attention, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> float:
    """Best time of one call, with its backward where gradients are wanted; the first two calls are not counted."""
    device = tensors[0].device
    best = float("inf")
    for repeat in range(REPEATS + 2):
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
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


def fastest(candidates: Mapping[str, Attention], measure: Callable[..., float] = seconds) -> Attention:
    """An attention that measures `candidates` at the first call of each kind and from then on uses the fastest."""
    chosen: dict[Any, Attention] = {}

    def call(*tensors: Tensor, **options: Any) -> Any:
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        plain = {name: isinstance(value, Tensor) or value for name, value in options.items()}
        kind = (tuple((x.shape, x.dtype) for x in tensors), tuple(sorted(plain.items(), key=str)), wants_gradient)
        if kind not in chosen:
            chosen[kind] = _choose(tensors, options)
        return chosen[kind](*tensors, **options)

    def _choose(tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> Attention:
        times: dict[str, float] = {}
        for name, candidate in candidates.items():
            try:
                times[name] = measure(candidate, tensors, options)
            except RuntimeError as error:  # a backend that refuses this call; torch.OutOfMemoryError is one, too
                logger.debug("kernels.attention: %s left out: %s", name, error)
        if not times:
            raise RuntimeError(
                f"no attention takes shapes {[tuple(x.shape) for x in tensors]}; tried {list(candidates)}"
            )
        best = min(times, key=lambda name: times[name])
        ratios = ", ".join(f"{name} {value / times[best]:.2f}" for name, value in times.items())
        logger.info("kernels.attention: %s for q %s (times: %s)", best, tuple(tensors[0].shape), ratios)
        return candidates[best]

    return call

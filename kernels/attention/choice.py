"""`kernels.attention = auto` on a GPU: the form that was measured fastest for a kind of call, the same on all ranks.

Which form is fastest depends on shape and device, and forms differ in the last bits. So `choose_attention` decides for
all kinds of call that a run will make before its first step: rank 0 measures and broadcasts, and the caller saves the
choice with the run's state, so that a resumed run computes the same bits. Any other kind (in generation the keys grow
with every token) is measured at its first call, by each rank on its own.

A candidate is measured only after its result, gradients included, was compared with the reference on this device
(`agreement.py`); one that was never proven on any device is tried in a process of its own before that (`trial.py`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .agreement import disagreement
from .call import Call
from .reference import Options, read_options
from .sdpa import attention_sdpa, fusable, plain_mask
from .trial import UNPROVEN, admitted
from .widths import at_one_width

if TYPE_CHECKING:
    from megalite.mesh import Mesh

    from ..dispatch import Kernels

Attention = Callable[..., Any]

logger = logging.getLogger("megalite.kernels")

REPEATS = 5
TIE = 1.03  # the first candidate within this factor of the fastest wins, so that noise alone rarely changes the bits
FALLBACK = "sdpa"


@dataclass(frozen=True)
class Checks:
    """How `MeasuredAttention` looks at a candidate."""

    seconds: Callable[..., float]
    disagreement: Callable[..., str | None]
    """As `agreement.disagreement`: what is wrong with its result for a call, or None."""
    admitted: Callable[..., set[Call]]
    """As `trial.admitted`: the kinds of call for which an unproven candidate may be used in this process."""


class MeasuredAttention:
    """An attention that uses the fastest of `candidates` for every kind of call.

    A candidate that fails for a kind (unsupported, out of memory, a failed compilation, a result that is not the
    reference's) is logged and excluded for it. If all fail, torch's own choice is used.
    """

    def __init__(self, candidates: Mapping[str, Attention], checks: Checks | None = None) -> None:
        self.candidates = {**candidates, FALLBACK: attention_sdpa}
        self.chosen: dict[Call, str] = {}
        self._checks = checks or Checks(seconds, disagreement, admitted)
        self._tried: dict[str, set[Call]] = {name: set() for name in UNPROVEN if name in candidates}
        self._call = at_one_width(self._by_the_fastest)

    def __call__(self, q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Any:
        return self._call(q_SBHD, k_SBKD, v_SBKD, **options)

    def _by_the_fastest(self, *tensors: Tensor, **options: Any) -> Any:
        call = Call.of(tensors, options)
        if call not in self.chosen:
            # Raises for an invalid call, which must not count as a failure of the candidates.
            read_options(tensors[0], tensors[1], tensors[2], options)
            self.chosen[call] = self._fastest(call, tensors, options)
        return self.candidates[self.chosen[call]](*tensors, **options)

    def try_unproven(self, calls: Iterable[Call], device: torch.device) -> None:
        """Let the candidates that were never proven on a device show what they compute; others are not concerned."""
        for name, tried in self._tried.items():
            refuses = getattr(self.candidates[name], "refuses", lambda call: None)
            tried |= self._checks.admitted(name, [call for call in calls if not refuses(call)], device)

    def decide(self, call: Call, device: torch.device, recorded: str | None) -> str:
        """The candidate for a kind of call: the recorded one if it still works, otherwise the fastest."""
        with torch.enable_grad() if call.gradients else torch.no_grad():
            tensors, options = call.example(device)
            if recorded in self.candidates:
                works = recorded == FALLBACK or self._time(recorded, call, tensors, options) < math.inf
                if works:
                    logger.info("kernels.attention: %s for %s (as before)", recorded, call.name(device))
                    return recorded
            return self._fastest(call, tensors, options)

    def _fastest(self, call: Call, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> str:
        # Candidates within TIE of the fastest count as equal, and the first of them wins: the order of `candidates` is
        # a preference, so that noise does not pick another form, and with it other last bits, from run to run.
        times = {name: self._time(name, call, tensors, options) for name in self.candidates if name != FALLBACK}
        best = min(times.values(), default=math.inf)
        if best == math.inf:
            return FALLBACK
        chosen = next(name for name, time in times.items() if time <= TIE * best)
        ratios = ", ".join(f"{name} {time / best:.2f}" for name, time in times.items() if time < math.inf)
        logger.info("kernels.attention: %s for %s (times: %s)", chosen, call.name(tensors[0].device), ratios)
        return chosen

    def _time(self, name: str, call: Call, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> float:
        if call not in self._tried.get(name, {call}):
            return math.inf
        try:
            reason = self._checks.disagreement(self.candidates[name], tensors, options)
            if reason is None:
                return self._checks.seconds(self.candidates[name], tensors, options)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("kernels.attention: %s is left out for %s: %s", name, call.name(tensors[0].device), reason[:200])
        return math.inf


def choose_attention(
    kernels: Kernels, calls: Iterable[Call], mesh: Mesh, recorded: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Choose the form of attention for each of `calls` on rank 0, for all ranks; collective, outside of a step.

    calls: the same on every rank; recorded: an earlier result, from a checkpoint. Returns kind of call -> candidate, as
    strings; empty if there is nothing to choose.
    """
    attention, calls = kernels.attention, list(calls)
    if not isinstance(attention, MeasuredAttention):
        return {}
    names = list(attention.candidates)
    picks = torch.full((len(calls),), names.index(FALLBACK), device=mesh.device)
    if mesh.rank == 0:
        attention.try_unproven(calls, mesh.device)
        for number, call in enumerate(calls):
            before = (recorded or {}).get(call.name(mesh.device))
            try:
                picks[number] = names.index(attention.decide(call, mesh.device, before))
            except Exception as error:  # the others wait for an answer
                logger.warning("kernels.attention: not measured for %s: %s", call.name(mesh.device), error)
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    mesh.world.broadcast(picks, 0).wait()
    chosen = {call: names[pick] for call, pick in zip(calls, picks.tolist())}
    attention.chosen |= chosen
    return {call.name(mesh.device): name for call, name in chosen.items()}


@dataclass(frozen=True)
class Within:
    """`kernel` as a candidate: raises for calls it does not support, so that no fallback is timed under its name."""

    kernel: Attention
    unsupported: Callable[..., str | None]

    def __call__(self, *tensors: Tensor, **options: Any) -> Any:
        if reason := self.unsupported(*tensors, **options):
            raise RuntimeError(reason)
        return self.kernel(*tensors, **options)

    def refuses(self, call: Call) -> str | None:
        """Why it does not support a kind of call, or None."""
        tensors, options = call.example(torch.device("meta"))
        return self.unsupported(*tensors, **options)


def sdpa_backends() -> dict[str, Attention]:
    """Torch's fused attention, one candidate per backend: its default is often not the fastest on Hopper."""

    def only(backend: SDPBackend) -> Attention:
        def call(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Any:
            asked = Options(**options)
            if not fusable(q_SBHD, k_SBKD, asked):
                raise RuntimeError("not a call that the fused operators do")
            masked = len(q_SBHD) > 1 and not plain_mask(q_SBHD, k_SBKD, asked)
            if masked and backend == SDPBackend.FLASH_ATTENTION:
                raise RuntimeError(
                    "torch's FlashAttention takes no mask of documents, windows or fewer queries than keys"
                )
            with sdpa_kernel(backend):
                return attention_sdpa(q_SBHD, k_SBKD, v_SBKD, **options)

        return call

    return {"sdpa-flash": only(SDPBackend.FLASH_ATTENTION), "sdpa-cudnn": only(SDPBackend.CUDNN_ATTENTION)}


def seconds(candidate: Attention, tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> float:
    """Best time of one call, including backward if gradients are needed; the first two calls are warm-up."""
    device, gradients = tensors[0].device, torch.is_grad_enabled()
    best = math.inf
    # Activation checkpointing around the call would intercept and count every tensor saved for backward, including
    # those of the measurement.
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself), torch.enable_grad():
        for repeat in range(REPEATS + 2):
            leaves = [x.detach().requires_grad_(gradients and x.requires_grad) for x in tensors]
            _synchronize(device)
            start = time.perf_counter()
            result = candidate(*leaves, **options)
            out = result[0] if isinstance(result, tuple) else result
            if out.requires_grad:
                torch.autograd.backward(out, torch.ones_like(out))
            _synchronize(device)
            if repeat >= 2:
                best = min(best, time.perf_counter() - start)
    return best


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

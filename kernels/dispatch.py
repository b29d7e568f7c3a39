"""Which implementation of each operation a run uses: chosen once from the configuration, named in the start-up log.

Triton is imported only when one of its kernels is chosen, so a machine without it runs the PyTorch forms.
"""

import difflib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from megalite.errors import UserError

from . import adamw, cross_entropy, flash_attention, rms_norm, rope, swiglu

OPERATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rms_norm": ("rms_norm", "add_rms_norm"),
        "rope": ("rope",),
        "attention": ("attention",),
        "swiglu": ("swiglu",),
        "cross_entropy": ("cross_entropy_stats", "cross_entropy_grad_", "cross_entropy_stats_grad_"),
        "adamw": ("adamw_", "square_sum"),
    }
)
"""Operation as the configuration names it -> the functions of `Kernels` that it chooses."""

_REFERENCES = {
    "rms_norm": rms_norm,
    "rope": rope,
    "attention": flash_attention,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
}


_KINDS = {"triton": "Triton", "native": "the compiled CPU kernel"}

logger = logging.getLogger("megalite.kernels")


@dataclass(frozen=True)
class Kernels:
    """One callable per operation, with the signatures of the plain PyTorch forms in the file of the operation's
    name."""

    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    attention: Callable[..., Any]
    swiglu: Callable[..., Any]
    cross_entropy_stats: Callable[..., Any]
    cross_entropy_grad_: Callable[..., Any]
    cross_entropy_stats_grad_: Callable[..., Any]
    adamw_: Callable[..., Any]
    square_sum: Callable[..., Any]
    choices: Mapping[str, str]
    """Operation -> the implementation taken and why, e.g. "reference (auto: no CUDA device)"."""

    def taken(self, operation: str) -> str:
        """`triton`, `native`, `sdpa` or `reference`."""
        return self.choices[operation].partition(" ")[0]

    def describe(self) -> str:
        """One line per operation for the start-up log."""
        return "\n".join(f"kernels.{operation}: {choice}" for operation, choice in self.choices.items())


def select_kernels(choices: Mapping[str, str], device: torch.device) -> Kernels:
    """The kernels for `device`, from the configuration's section `kernels`.

    choices: "default" (auto, triton, reference; auto where absent) and per operation (`OPERATIONS`), where "attention"
    also takes sdpa. Raises UserError for an unknown name or value, and for triton where it cannot run.
    """
    _refuse_unknown(choices)
    default = choices.get("default", "auto")
    functions: dict[str, Callable[..., Any]] = {}
    report: dict[str, str] = {}
    for operation, names in OPERATIONS.items():
        wanted = choices.get(operation, default)
        field = operation if operation in choices else "default"
        taken, why = _take(operation, wanted, device, field)
        module = _module(operation, taken)
        for name in names:
            function = getattr(module, f"{name}_sdpa" if taken == "sdpa" else name)
            if taken in ("triton", "native"):
                plain = getattr(_REFERENCES[operation], "attention_sdpa" if name == "attention" else name)
                function = _with_fallback(name, taken, function, module.unsupported, plain)
            if operation == "attention" and taken == "triton" and wanted == "auto" and device.type == "cuda":
                choice = import_module(f"{__package__}.attention_choice")
                kept = choice.MeasuredTimes(choice.cache_file(), choice.environment(device))
                function = choice.fastest({"triton": function, **choice.sdpa_backends()}, kept)
                why = " or sdpa (auto: measured at the first call of each shape)"
            functions[name] = function
        report[operation] = f"{taken}{why}"
    return Kernels(**functions, choices=MappingProxyType(report))


def _values(operation: str) -> tuple[str, ...]:
    return ("auto", "triton", "sdpa", "reference") if operation == "attention" else ("auto", "triton", "reference")


def _refuse_unknown(choices: Mapping[str, str]) -> None:
    names = ("default", *OPERATIONS)
    for name, value in choices.items():
        if name not in names:
            raise UserError(f"kernels.{name}: no such operation; {_did_you_mean(name, names)}")
        if value not in _values(name):
            raise UserError(
                f"kernels.{name} = {value!r}: no such implementation; {_did_you_mean(value, _values(name))}"
            )


def _did_you_mean(word: object, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"


def _take(operation: str, wanted: str, device: torch.device, field: str) -> tuple[str, str]:
    """The implementation to use and, in brackets, why it was not simply named."""
    obstacle = _triton_obstacle(device)
    if wanted == "triton" and obstacle:
        raise UserError(f"kernels.{field} = 'triton': {obstacle}; use auto or reference")
    if wanted != "auto":
        return wanted, ""
    if obstacle is None:
        return "triton", " (auto)"
    why = obstacle.partition(":")[0]
    missing = import_module(f"{__package__}.native").obstacle() if device.type == "cpu" else None
    compiled = device.type == "cpu" and missing is None
    if operation == "attention":
        return "sdpa", f"{' or native, by dtype and width' if compiled else ''} (auto: {why})"
    if operation == "adamw":
        return "reference", f" (auto: {why})"
    return ("native" if compiled else "reference"), f" (auto: {why}{f', and {missing}' if missing else ''})"


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"no GPU: device {device.type} runs Triton only in its interpreter (TRITON_INTERPRET=1)"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def _with_fallback(
    name: str,
    taken: str,
    kernel: Callable[..., Any],
    unsupported: Callable[..., str | None],
    plain: Callable[..., Any],
) -> Callable[..., Any]:
    """`kernel`, but `plain` for arguments that it does not take; every reason is logged once."""
    told: set[str] = set()

    @functools.wraps(kernel)
    def call(*args: Any, **options: Any) -> Any:
        reason = unsupported(*args, **options)
        if reason is None:
            return kernel(*args, **options)
        if reason not in told:
            told.add(reason)
            logger.warning("kernels.%s: PyTorch instead of %s for this call: %s", name, _KINDS[taken], reason)
        return plain(*args, **options)

    return call


def _module(operation: str, taken: str) -> Any:
    reference = _REFERENCES[operation]
    if taken == "native":
        return import_module(f"{__package__}.native")
    return import_module(f"{reference.__name__}_triton") if taken == "triton" else reference

"""The implementation of each operation: chosen once from the configuration, and listed in the start-up log.

Triton is imported only when one of its kernels is chosen, so a machine without it runs the PyTorch forms.
"""

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

from .attention.parts import PLAIN_PARTS, AttentionParts

OPERATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rms_norm": ("rms_norm", "add_rms_norm"),
        "rope": ("rope", "rope_qkv"),
        "attention": ("attention",),
        "swiglu": ("swiglu", "swiglu_again", "geglu"),
        "grouped": ("grouped_product", "grouped_input_gradient", "grouped_weight_gradient_"),
        "cross_entropy": ("cross_entropy_stats", "cross_entropy_grad_", "cross_entropy_stats_grad_"),
        "adamw": ("adamw_", "square_sum"),
        "symmetric": ("symmetric_product",),
        "fp8": ("fp8_cast", "fp8_cast_transpose"),
        "fp8_blocks": ("fp8_cast_blocks", "fp8_cast_weight_blocks", "fp8_block_product"),
    }
)
"""Operation as the configuration names it, and the module of its plain form -> the functions that it chooses."""

PLAIN_ALONE = ("geglu",)
"""Functions that have the plain form alone."""

_PLAIN_ON_CPUS = ("adamw", "grouped", "symmetric", "fp8", "fp8_blocks")
"""Operations whose plain form is compiled code already, torch's fused AdamW and BLAS products, or is there to be
compared with alone: processors have no 8-bit floats."""

_PLAIN_UNLESS_NAMED = ("symmetric",)
"""Operations whose Triton form must be measured before `auto` may prefer it: it saves half of the flop, but has the
vendor's product to beat."""

_KINDS = {"triton": "Triton", "native": "the compiled CPU kernel", "torch": "torch's operator"}

logger = logging.getLogger("megalite.kernels")


@dataclass(frozen=True)
class Kernels:
    """One callable per operation, with the signatures of the plain PyTorch forms in the module of the operation's
    name, and two forms of attention besides: over a part of the keys, and of one query to a buffer."""

    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    rope_qkv: Callable[..., Any]
    attention: Callable[..., Any]
    attention_parts: AttentionParts
    decode_attention: Callable[..., Any]
    swiglu: Callable[..., Any]
    swiglu_again: Callable[..., Any]
    geglu: Callable[..., Any]
    grouped_product: Callable[..., Any]
    grouped_input_gradient: Callable[..., Any]
    grouped_weight_gradient_: Callable[..., Any]
    cross_entropy_stats: Callable[..., Any]
    cross_entropy_grad_: Callable[..., Any]
    cross_entropy_stats_grad_: Callable[..., Any]
    adamw_: Callable[..., Any]
    square_sum: Callable[..., Any]
    symmetric_product: Callable[..., Any]
    fp8_cast: Callable[..., Any]
    fp8_cast_transpose: Callable[..., Any]
    fp8_cast_blocks: Callable[..., Any]
    fp8_cast_weight_blocks: Callable[..., Any]
    fp8_block_product: Callable[..., Any]
    choices: Mapping[str, str]
    """Operation -> the implementation taken and why, e.g. "reference (auto: no CUDA device)"."""

    def taken(self, operation: str) -> str:
        """`triton`, `native`, `reference`; also `torch` (grouped products), `sdpa`, `cpu`, `measured` (attention)."""
        return self.choices[operation].partition(" ")[0]

    def describe(self) -> str:
        """One line per operation for the start-up log."""
        return "\n".join(f"kernels.{operation}: {choice}" for operation, choice in self.choices.items())


def select_kernels(choices: Mapping[str, str], device: torch.device, *, deterministic: bool = False) -> Kernels:
    """The kernels for `device`, from the configuration's section `kernels`, whose names and values are checked there.

    choices: "default" (auto where absent) and per operation (`OPERATIONS`). deterministic: choose by rule, measure
    nothing. Raises UserError for an implementation that cannot run here.
    """
    functions: dict[str, Any] = {}
    report: dict[str, str] = {}
    for operation, names in OPERATIONS.items():
        field = operation if operation in choices else "default"
        wanted = choices.get(field, "auto")
        if wanted == "triton" and (obstacle := _triton_obstacle(device)):
            raise UserError(f"kernels.{field} = 'triton': {obstacle}; use auto or reference")
        if operation == "attention":
            taken, why = _take_attention(wanted, device, deterministic)
            functions["attention"] = _attention(taken, device)
            functions["attention_parts"] = _attention_parts(taken, device)
            functions["decode_attention"] = _decode_attention(taken, device)
        else:
            taken, why = _take(operation, wanted, device)
            functions |= {name: _function(operation, name, taken) for name in names}
        report[operation] = f"{taken}{why}"
    return Kernels(**functions, choices=MappingProxyType(report))


def _take(operation: str, wanted: str, device: torch.device) -> tuple[str, str]:
    """The implementation to use and, in brackets, the reason if it was not configured by name."""
    if wanted != "auto":
        return wanted, ""
    if operation in _PLAIN_UNLESS_NAMED:
        return "reference", " (auto)"
    obstacle = _triton_obstacle(device)
    if obstacle is None:
        return "triton", " (auto)"
    why, missing = obstacle.partition(":")[0], _missing_extension(device)
    if operation in _PLAIN_ON_CPUS or device.type != "cpu":
        return "reference", f" (auto: {why})"
    return ("reference", f" (auto: {why}, and {missing})") if missing else ("native", f" (auto: {why})")


def _take_attention(wanted: str, device: torch.device, deterministic: bool) -> tuple[str, str]:
    if wanted == "cpu" and device.type != "cpu":
        raise UserError(f"kernels.attention = 'cpu': the device is {device.type}; use auto, triton, sdpa or reference")
    if wanted != "auto":
        return wanted, ""
    obstacle = _triton_obstacle(device)
    if device.type == "cuda":
        if deterministic:
            return ("sdpa" if obstacle else "triton"), " (auto: train.deterministic)"
        forms, without = ", ".join(attention_candidates(device)), _gluon_obstacle(device)
        return "measured", f" (auto: the fastest of {forms} for each shape{f'; gluon: {without}' if without else ''})"
    if obstacle is None:
        return "triton", " (auto)"
    why, missing = obstacle.partition(":")[0], _missing_extension(device)
    if device.type != "cpu":
        return "sdpa", f" (auto: {why})"
    return "cpu", f" (auto: {why}{f', and {missing}' if missing else '; compiled or PyTorch, by dtype and width'})"


def _missing_extension(device: torch.device) -> str | None:
    return import_module(f"{__package__}.native").obstacle() if device.type == "cpu" else None


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"no GPU: device {device.type} runs Triton only in its interpreter (TRITON_INTERPRET=1)"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def _gluon_obstacle(device: torch.device) -> str | None:
    """Why attention with specialised warps is no candidate here, or None."""
    if obstacle := _triton_obstacle(device):
        return obstacle
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    if device.type != "cuda" or capability != (9, 0):
        return "made for compute capability 9.0 alone"
    try:
        import_module(f"{__package__}.attention.flash_gluon")
    except Exception as error:  # an experimental part of triton, which changes from version to version
        return f"this triton has another Gluon ({(str(error) or type(error).__name__).splitlines()[0]})"
    return None


def _function(operation: str, name: str, taken: str) -> Callable[..., Any]:
    plain = getattr(import_module(f"{__package__}.{operation}"), name)
    if taken == "reference":
        return plain  # type: ignore[no-any-return]
    module = import_module(f"{__package__}.{'native' if taken == 'native' else f'{operation}_{taken}'}")
    if name in PLAIN_ALONE:
        return _with_fallback(name, taken, plain, lambda *_, **__: "there is no such kernel", plain)
    return _with_fallback(name, taken, getattr(module, name), module.unsupported, plain)


def _attention(taken: str, device: torch.device) -> Callable[..., Any]:
    def form(module: str) -> Any:
        return import_module(f"{__package__}.attention.{module}")

    if taken == "reference":
        return form("reference").attention_reference  # type: ignore[no-any-return]
    sdpa, at_one_width = form("sdpa").attention_sdpa, form("widths").at_one_width
    if taken == "triton":
        flash = form("flash_triton")
        fused = _with_fallback("attention", taken, flash.attention, flash.unsupported, sdpa)
        return at_one_width(fused)  # type: ignore[no-any-return]
    if taken == "measured":
        return form("choice").MeasuredAttention(attention_candidates(device))  # type: ignore[no-any-return]
    return at_one_width({"sdpa": sdpa, "cpu": form("cpu").attention_cpu}[taken])  # type: ignore[no-any-return]


def attention_candidates(device: torch.device) -> dict[str, Callable[..., Any]]:
    """What `attention = auto` measures on a GPU, by name; of equally fast ones the first is taken."""
    choice = import_module(f"{__package__}.attention.choice")
    found: dict[str, Callable[..., Any]] = {}
    for name, module, obstacle in (
        ("triton", "flash_triton", _triton_obstacle(device)),
        ("gluon", "flash_gluon", _gluon_obstacle(device)),
    ):
        if obstacle is None:
            form = import_module(f"{__package__}.attention.{module}")
            found[name] = choice.Within(form.attention, form.unsupported)
    return {**found, **choice.sdpa_backends()}


def _attention_parts(taken: str, device: torch.device) -> AttentionParts:
    """The kernels that give and take log-sum-exps: Triton's or the compiled ones, where the choice allows them."""
    if taken in ("triton", "measured") and _triton_obstacle(device) is None:
        return import_module(f"{__package__}.attention.flash_triton").FlashParts()  # type: ignore[no-any-return]
    if taken == "cpu" and _missing_extension(device) is None:
        return import_module(f"{__package__}.native").NativeParts()  # type: ignore[no-any-return]
    return PLAIN_PARTS


def _decode_attention(taken: str, device: torch.device) -> Callable[..., Any]:
    """Triton's where the choice allows it: nothing is measured, since a graph is made of one form."""
    plain = import_module(f"{__package__}.attention.decode").decode_attention
    if taken not in ("triton", "measured") or _triton_obstacle(device) is not None:
        return plain  # type: ignore[no-any-return]
    form = import_module(f"{__package__}.attention.decode_triton")
    return _with_fallback("attention", "triton", form.decode_attention, form.unsupported, plain)


def _with_fallback(
    name: str,
    taken: str,
    kernel: Callable[..., Any],
    unsupported: Callable[..., str | None],
    plain: Callable[..., Any],
) -> Callable[..., Any]:
    """`kernel`, but `plain` for arguments it does not support; every reason is logged once."""
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

"""Whether a form of attention computes what the specification does, on the device and at the size of its use.

A whole call of the reference would need O(S T) memory, so the result is compared in blocks of queries: some at the
beginning, which see few keys, some in the middle and the last. The output's gradient is zero in all other rows, so that
those of keys and values come from the compared rows alone.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim, N compared queries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .reference import Documents, Options, attention_reference, read_options

Tensors = tuple[Tensor, ...]

SCORES = 1 << 26
"""Scores of a block; in fp32 a quarter of a GiB, and the reference's backward holds a few such tensors."""
MOST_ROWS = 128
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 1e-4}
"""Relative error in the Euclidean norm: several times what rounding probabilities and results to the dtype costs, where
one key too many in a row of a few keys costs tens of percent."""
TF32_TOLERANCE = 4e-3
LARGEST = 2
"""The error of a single number may be this many times the tolerance, over the largest number."""


def disagreement(candidate: Callable[..., Any], tensors: Tensors, options: Mapping[str, Any]) -> str | None:
    """How far `candidate` is from the reference for a call (q, k, v and `Options` by name), or None where it agrees.

    With gradients enabled, those of the tensors that require them are compared as well. Raises what the candidate does.
    """
    asked = read_options(tensors[0], tensors[1], tensors[2], dict(options))
    (queries, batch, heads, _), keys = tensors[0].shape, tensors[1].shape[0]
    rows = max(1, min(MOST_ROWS, SCORES // max(1, batch * heads * keys)))
    chosen = blocks(queries, keys, rows, asked.causal)
    leaves = tuple(x.detach().requires_grad_(torch.is_grad_enabled() and x.requires_grad) for x in tensors)
    # As in `choice.seconds`: activation checkpointing around the call must not count what is saved here.
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself), torch.enable_grad():
        result = candidate(*leaves, **options)
        out_SBHD, *lse_BHS = result if isinstance(result, tuple) else (result,)
        upstream_SBHD = torch.zeros_like(out_SBHD)
        draws = torch.Generator(out_SBHD.device).manual_seed(0)  # the run's own random numbers stay as they are
        for block in chosen:
            upstream_SBHD[block.start : block.stop].normal_(generator=draws)
        exact = _by_the_reference(leaves, asked, chosen, upstream_SBHD)
        got = [torch.cat([x[block.start : block.stop] for block in chosen]) for x in _rows_first(out_SBHD, *lse_BHS)]
        if any(x.requires_grad for x in leaves):
            got += torch.autograd.grad(out_SBHD, [x for x in leaves if x.requires_grad], upstream_SBHD)
    tolerance = TOLERANCE.get(out_SBHD.dtype, TOLERANCE[torch.float32])
    if out_SBHD.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        tolerance = TF32_TOLERANCE
    for (name, want), have in zip(exact.items(), got, strict=True):
        if fault := _fault(have.detach(), want.detach(), tolerance):
            return f"its {name} is not the reference's: {fault}"
    return None


def blocks(queries: int, keys: int, rows: int, causal: bool) -> list[range]:
    """The queries to compare: all where they are few; otherwise `rows` of them, where their keys can be cut off."""
    if queries <= 3 * rows:
        return [range(queries)]
    last = range(queries - rows, queries)
    if not causal or keys < queries:
        return [last]
    middle = (queries - rows) // 2
    return [range(rows), range(middle, middle + rows), last]


def _by_the_reference(leaves: Tensors, asked: Options, chosen: list[range], upstream_SBHD: Tensor) -> dict[str, Tensor]:
    """The compared rows and the gradients, by name, in fp32 (float64 for fp32)."""
    wide = torch.float64 if leaves[0].dtype == torch.float32 else torch.float32
    beyond = len(leaves[1]) - len(leaves[0])
    names = [name for name, x in zip("qkv", leaves, strict=True) if x.requires_grad]
    grads = {name: torch.zeros_like(x, dtype=wide) for name, x in zip("qkv", leaves, strict=True) if x.requires_grad}
    found: list[list[Tensor]] = []
    for block in chosen:
        keys = block.stop + beyond if asked.causal and beyond >= 0 else len(leaves[1])
        spans = {"q": slice(block.start, block.stop), "k": slice(keys), "v": slice(keys)}
        parts = [x.detach()[span].to(wide) for x, span in zip(leaves, spans.values(), strict=True)]
        part = dict(zip("qkv", parts, strict=True))
        documents = None if asked.packed is None else Documents(asked.packed.numbers_TB[:keys])
        for name in names:
            part[name].requires_grad_()
        result = attention_reference(*parts, **asked._replace(documents=documents)._asdict())
        out, *lse = result if isinstance(result, tuple) else (result,)
        found.append(_rows_first(out, *lse))
        if names:
            upstream = upstream_SBHD[spans["q"]].to(wide)
            for name, grad in zip(names, torch.autograd.grad(out, [part[name] for name in names], upstream)):
                grads[name][spans[name]] += grad
    rows = dict(zip(("output", "log-sum-exp"), (torch.cat(each) for each in zip(*found))))
    return {**rows, **{f"gradient of {name}": grad for name, grad in grads.items()}}


def _rows_first(out_SBHD: Tensor, *lse_BHS: Tensor) -> list[Tensor]:
    return [out_SBHD, *(x.permute(2, 0, 1) for x in lse_BHS)]


def _fault(got: Tensor, exact: Tensor, tolerance: float) -> str | None:
    nothing = exact == -torch.inf  # the log-sum-exp of a row that sees no key
    if not torch.equal(nothing, got == -torch.inf):
        return "other rows see no key"
    exact, error = exact.masked_fill(nothing, 0), (got.to(exact.dtype) - exact).masked_fill(nothing, 0)
    norm, largest = (f(error).item() / max(f(exact).item(), 1e-30) for f in (torch.linalg.vector_norm, _largest))
    if norm <= tolerance and largest <= LARGEST * tolerance:
        return None
    return f"relative error {norm:.2g}, of the largest number {largest:.2g}; rounding explains {tolerance:.2g}"


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def _itself(tensor: Tensor) -> Tensor:
    return tensor

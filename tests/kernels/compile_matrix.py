"""Compile every kernel for NVIDIA targets without a GPU, and report what the compiler made of it.

`python -m tests.kernels.compile_matrix [--quick]` prints a table (registers, stack, shared memory, tensor-core and
TMA instructions) and exits 1 where a configuration spills more than `compile_allowance.toml` grants, needs more shared
memory than the device has, or lacks wgmma on sm_90. Needs a process without TRITON_INTERPRET; triton has the tools.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalite.kernels import adamw_triton, cross_entropy_triton, rms_norm_triton, rope_triton, swiglu_triton
from megalite.kernels import flash_attention_kernels as flash
from megalite.kernels import flash_attention_triton as launches

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may opt in to
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ALLOWANCE = Path(__file__).with_name("compile_allowance.toml")


@dataclass
class Case:
    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    types: dict[str, str] = field(default_factory=dict)
    """Argument types that do not follow from the argument's name."""
    products: bool = False


def argument_type(name: str) -> str:
    if name.endswith("_ptr"):
        wide = ("rstd", "share", "lse", "delta", "stats", "master", "exp_avg", "scale", "cos", "sin")
        return "*fp32" if name.startswith(wide) or name == "grad_ptr" else "*bf16"
    floats = ("eps", "scale", "softcap", "lr", "step_size", "beta", "rest", "root", "z_loss", "label", "uniform")
    return "fp32" if name.startswith(floats) else "i32"


def compiled(case: Case, target: int) -> Any:
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, argument_type(n)) for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, n in enumerate(names)
        if signature[n].startswith("*") or "stride" in n or n in ("hidden", "width") or n.endswith(("_outer", "_inner"))
    }
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def small_cases() -> Iterator[Case]:
    for hidden in (128, 4096, 8192):
        rows, block, warps = rms_norm_triton._tile(hidden)
        for fused in (False, True):
            constants = {"FUSED": fused, "ROWS": rows, "BLOCK": block}
            name = f"{'add_' if fused else ''}rms_norm h{hidden}"
            yield Case(f"{name} forward", rms_norm_triton.rms_norm_forward_kernel, constants, warps)
            yield Case(f"{name} backward", rms_norm_triton.rms_norm_backward_kernel, constants, warps)
    _, options = swiglu_triton._launch(14336, 1)
    for direction in ("forward", "backward"):
        kernel = getattr(swiglu_triton, f"swiglu_{direction}_kernel")
        types = {"grad_ptr": "*bf16"}
        yield Case(f"swiglu {direction}", kernel, {"BLOCK": options["BLOCK"]}, options["num_warps"], types=types)
    for rest in (0, 64):
        constants = {"INVERSE": False, "HEADS": 32, "HALF": 64, "REST": rest}
        yield Case(f"rope d128 rest {rest}", rope_triton.rope_kernel, constants, 8)
    ce, blocks = cross_entropy_triton, {"BLOCK": cross_entropy_triton.BLOCK}
    types = {"targets_ptr": "*i64"}
    yield Case("cross_entropy stats", ce.stats_kernel, blocks, ce.WARPS, types=types)
    yield Case("cross_entropy grad", ce.grad_kernel, blocks, ce.WARPS, types=types)
    yield Case("cross_entropy stats+grad", ce.stats_grad_kernel, blocks, ce.FUSED_WARPS, types=types)
    constants = {"HAS_PARAM": True, "BLOCK": adamw_triton.BLOCK}
    yield Case("adamw", adamw_triton.adamw_kernel, constants, 4)
    types = {"flat_ptr": "*fp32", "shares_ptr": "*fp64"}
    yield Case("square_sum", adamw_triton.square_sum_kernel, {"BLOCK": adamw_triton.BLOCK}, 4, types=types)


def attention_case(what: str, width: int, target: int, mask: str) -> Case:
    kernel, table = {
        "forward": (flash.forward_kernel, launches.FORWARD),
        "dkdv": (flash.dkdv_kernel, launches.DKDV),
        "dq": (flash.dq_kernel, launches.DQ),
    }[what]
    descriptors = target >= 90
    block_m, block_n, warps, stages = launches.tiles(table, width, 2, descriptors)
    block_d = launches.head_block(width)
    constants = {
        "CAUSAL": True, "WINDOW": mask == "window", "TABLE": mask == "documents", "SOFTCAP": mask == "softcap",
        "DESCRIPTORS": descriptors, "PRECISION": "tf32", "BLOCK_M": block_m, "BLOCK_N": block_n, "WIDTH": width,
        "BLOCK_D": block_d,
    }  # fmt: skip
    if mask != "documents":
        constants["table"] = None
    types = {"table": "*i32"}
    for name, rows in (("q", block_m), ("dout", block_m), ("k", block_n), ("v", block_n)):
        types[name] = f"tensordesc<bf16[1,1,{rows},{block_d}]>" if descriptors else "*bf16"
    return Case(f"attention {what} d{width} {mask}", kernel, constants, warps, stages, types, products=True)


def cases(target: int, quick: bool) -> Iterator[Case]:
    yield from (case for case in small_cases() if not quick or "h4096" in case.name)
    for what in ("forward",) if quick else ("forward", "dkdv", "dq"):
        yield attention_case(what, 128, target, "causal")
        if target == 90 and not quick:
            yield attention_case(what, 128, target, "documents")
            yield attention_case(what, 128, target, "softcap")
        if target != 100 and not quick:
            yield attention_case(what, 64, target, "causal")
            yield attention_case(what, 256, target, "causal")


def check(case: Case, target: int, allowance: dict[str, Any]) -> list[str]:
    """Print the case's line of the table; return what is wrong with it."""
    made = compiled(case, target)
    used, ptx = resources(made.asm["cubin"]), made.asm["ptx"]
    counts = {kind: ptx.count(kind) for kind in ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor")}
    kinds = " ".join(f"{kind}x{count}" for kind, count in counts.items() if count)
    print(
        f"sm_{target:<4}{case.name:<36}{case.warps:>3} warps {used['REG']:>4} registers {used['STACK']:>5} stack "
        f"{made.metadata.shared:>7} shared  {kinds}",
        flush=True,
    )
    if target == 100:
        return []  # has to compile; nothing is tuned for it
    label, wrong = f"sm_{target} {case.name}", []
    granted = allowance.get(label, {}).get("stack", 0)
    if used["STACK"] > granted:
        wrong.append(f"{label}: {used['STACK']} bytes of stack, {granted} allowed")
    if made.metadata.shared > SHARED_LIMIT[target]:
        wrong.append(f"{label}: {made.metadata.shared} bytes of shared memory, the device has {SHARED_LIMIT[target]}")
    if case.products and target == 90 and not counts["wgmma.mma_async"]:
        wrong.append(f"{label}: no wgmma")
    return wrong


def main() -> int:
    quick = "--quick" in sys.argv
    allowance = tomllib.loads(ALLOWANCE.read_text())
    wrong: list[str] = []
    for target in (90,) if quick else TARGETS:
        for case in cases(target, quick):
            wrong += check(case, target, allowance)
    print("\n".join(wrong) or "every configuration is within its limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

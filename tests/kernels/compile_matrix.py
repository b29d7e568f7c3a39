"""Compile every kernel for NVIDIA targets without a GPU, and report what the compiler made of it.

`python -m tests.kernels.compile_matrix [--quick] [--json FILE]` prints a table (registers, stack, shared memory,
tensor-core and TMA instructions) and exits 1 where a configuration spills more than `compile_allowance.toml` grants,
needs more shared memory than the device has, or lacks wgmma on sm_90 or what specialised warps consist of. Needs a
process without TRITON_INTERPRET; triton brings the tools. The numbers belong to triton's version: run it with the one
the GPU machine has.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from megalite.kernels import (
    adamw_triton,
    cross_entropy_triton,
    fp8_blocks_triton,
    fp8_triton,
    grouped_triton,
    rms_norm_triton,
    rope_triton,
    swiglu_triton,
    symmetric_triton,
)
from megalite.kernels.attention import decode_triton as decode
from megalite.kernels.attention import flash_gluon as gluon
from megalite.kernels.attention import flash_gluon_backward_kernels as gluon_backward
from megalite.kernels.attention import flash_gluon_kernels as gluon_kernels
from megalite.kernels.attention import flash_triton as launches
from megalite.kernels.attention import flash_triton_kernels as flash
from megalite.kernels.layout import warps_for

TARGETS = (80, 86, 89, 90, 100, 120)
KINDS = {80: launches.AMPERE, 90: launches.HOPPER, 100: launches.HOPPER}  # others have little shared memory
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
        if signature[n].startswith("*")
        or "stride" in n
        or n in ("hidden", "width", "depth", "inputs", "outputs")
        or n.endswith(("_outer", "_inner"))
    }
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    kind = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = kind(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def ones(*names: str) -> dict[str, int]:
    """Arguments that are 1: a launch makes those constants, so they are another program than the general one."""
    return dict.fromkeys(names, 1)


def norm_cases() -> Iterator[Case]:
    for hidden in (128, 4096, 8192, 12288, 16384):
        rows, block, warps = rms_norm_triton._tile(hidden)
        for fused in (False, True):
            constants = {"FUSED": fused, "ROWS": rows, "BLOCK": block}
            name = f"{'add_' if fused else ''}rms_norm h{hidden}"
            yield Case(f"{name} forward", rms_norm_triton.rms_norm_forward_kernel, constants, warps)
            yield Case(f"{name} backward", rms_norm_triton.rms_norm_backward_kernel, constants, warps)
    constants = {"FUSED": False, "ROWS": 4096, "BLOCK": 1, **ones("rows", "inner", "hidden", "x_inner", "x_row_inner")}
    for direction in ("forward", "backward"):
        kernel = getattr(rms_norm_triton, f"rms_norm_{direction}_kernel")
        here = {name: value for name, value in constants.items() if name in kernel.arg_names}
        yield Case(f"rms_norm one number {direction}", kernel, here, 8)


def pointwise_cases() -> Iterator[Case]:
    _, options = swiglu_triton._launch(14336, 1)
    for direction in ("forward", "backward"):
        kernel = getattr(swiglu_triton, f"swiglu_{direction}_kernel")
        types = {"grad_ptr": "*bf16"}
        for again in (False, True) if direction == "backward" else (None,):
            flag, name = ({}, "") if again is None else ({"AGAIN": again}, " again" if again else "")
            constants = {"BLOCK": options["BLOCK"], **flag}
            yield Case(f"swiglu {direction}{name}", kernel, constants, options["num_warps"], types=types)
            constants = {"BLOCK": 1, **flag, **ones("inner", "width")}
            yield Case(f"swiglu one number {direction}{name}", kernel, constants, 1, types=types)
    for inverse, rest, special in ((False, 0, {}), (True, 64, {}), (False, 0, ones("batch", "q_heads", "k_heads"))):
        constants = {"INVERSE": inverse, "COPY": not special, "HEADS": 32, "HALF": 64, "REST": rest, **special}
        name = f"rope d128 {'backward' if inverse else 'forward'} rest {rest}{' one head' if special else ''}"
        yield Case(name, rope_triton.rope_kernel, constants, 8)
    constants = {"HAS_PARAM": True, "BLOCK": adamw_triton.BLOCK}
    yield Case("adamw", adamw_triton.adamw_kernel, constants, 4)
    yield Case("adamw one number", adamw_triton.adamw_kernel, {**constants, **ones("count")}, 4)
    types = {"flat_ptr": "*fp32", "shares_ptr": "*fp64"}
    yield Case("square_sum", adamw_triton.square_sum_kernel, {"BLOCK": adamw_triton.BLOCK}, 4, types=types)


def loss_cases() -> Iterator[Case]:
    ce, types = cross_entropy_triton, {"targets_ptr": "*i64"}
    for name, block, special in (("", ce.BLOCK, ()), (" one column", 1, ("columns", "valid", "row_stride"))):
        for what, kernel, warps in (
            ("stats", ce.stats_kernel, ce.WARPS),
            ("grad", ce.grad_kernel, ce.WARPS),
            ("stats+grad", ce.stats_grad_kernel, ce.FUSED_WARPS),
        ):
            constants = {"BLOCK": block, **ones(*(n for n in special if n in kernel.arg_names))}
            yield Case(f"cross_entropy {what}{name}", kernel, constants, warps, types=types)


def grouped_cases() -> Iterator[Case]:
    """Eight experts of Mixtral's size, and 128 of Qwen3's; tiles are the same for both."""
    rows, columns, inner, warps, stages = grouped_triton.TILES
    tile = {"PRECISION": "tf32", "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner}
    types = {"ends_ptr": "*i64", "total_ptr": "*fp32"}
    kernel = grouped_triton.grouped_rows_kernel
    for groups, wide, special in ((8, True, {}), (8, False, {}), (128, True, {}), (1, True, ones("groups"))):
        name = f"grouped {'product' if wide else 'input gradient'} of {groups}"
        yield Case(
            name, kernel, {**tile, "WIDE": wide, "GROUPS": groups, **special}, warps, stages, types, products=True
        )
    yield Case("grouped weight gradient", grouped_triton.grouped_weights_kernel, tile, warps, stages, types, True)


def symmetric_cases() -> Iterator[Case]:
    block, _, inner, warps, stages = symmetric_triton.TILES
    tile = {"PRECISION": "tf32", "BLOCK": block, "BLOCK_K": inner}
    types = {"alpha": "fp32", "beta": "fp32"}
    for add in (False, True):
        special = ones("column_stride") if add else ones("row_stride")  # tall matrices are read transposed
        name = f"symmetric product{' and addend' if add else ' of a transposed matrix'}"
        constants = {**tile, "ADD": add, **special}
        yield Case(name, symmetric_triton.symmetric_kernel, constants, warps, stages, types, products=True)


def fp8_cases() -> Iterator[Case]:
    """Both dtypes; rows in registers, and rows that are read again."""
    whole, tile = {"BLOCK": fp8_triton.BLOCK}, {"TILE": fp8_triton.TILE}
    pointers = ("largest_ptr", "by_row_ptr", "by_column_ptr")
    types = {**dict.fromkeys(pointers, "*i32"), "row_scale_ptr": "*fp32", "column_scale_ptr": "*fp32"}
    yield Case("fp8 largest", fp8_triton.largest_kernel, whole, fp8_triton.WARPS, types=types)
    kernel = fp8_triton.largest_of_tiles_kernel
    yield Case("fp8 largest of tiles", kernel, tile, fp8_triton.TILE_WARPS, types=types)
    for name, kind, limit in (("e4m3", "*fp8e4nv", 448.0), ("e5m2", "*fp8e5", 57344.0)):
        here = {**types, "codes_ptr": kind, "turned_ptr": kind}
        constants = {**whole, "LIMIT": limit, "SHARES": 1024}
        yield Case(f"fp8 cast {name}", fp8_triton.cast_kernel, constants, fp8_triton.WARPS, types=here)
        for block, held in ((4096, True), (fp8_triton.ROW, True), (fp8_triton.BLOCK, False)):
            constants = {"LIMIT": limit, "HELD": held, "BLOCK": block}
            label = f"fp8 cast rows {name} {block if held else 'long'}"
            yield Case(label, fp8_triton.cast_rows_kernel, constants, warps_for(block), types=here)
        for per_row in (False, True):
            constants = {**tile, "LIMIT": limit, "PER_ROW": per_row}
            label = f"fp8 cast both {name}{' rows' if per_row else ''}"
            yield Case(label, fp8_triton.cast_tiles_kernel, constants, fp8_triton.TILE_WARPS, types=here)
        constants = {"LIMIT": limit, "ROWS": fp8_blocks_triton.ROWS, "BLOCK": fp8_blocks_triton.BLOCK}
        kernel, here = fp8_blocks_triton.cast_blocks_kernel, {"codes_ptr": kind, "scale_ptr": "*fp32"}
        yield Case(f"fp8 cast blocks {name}", kernel, constants, fp8_blocks_triton.WARPS, types=here)
        rows, group, warps, stages = fp8_blocks_triton.PRODUCT
        kernel, block = fp8_blocks_triton.block_product_kernel, fp8_blocks_triton.BLOCK
        constants, scales = {"BLOCK_M": rows, "BLOCK": block, "GROUP": group}, ("a_scale_ptr", "b_scale_ptr")
        here = {"a_ptr": kind, "b_ptr": "*fp8e4nv", **dict.fromkeys(scales, "*fp32")}
        # forward: scales of a weight as they are; backward: transposed
        special = ones("across_stride") if name == "e4m3" else ones("down_stride")
        yield Case(f"fp8 block product {name}", kernel, {**constants, **special}, warps, stages, here, products=True)
    kernel, warps = fp8_blocks_triton.cast_weight_blocks_kernel, fp8_blocks_triton.WEIGHT_WARPS
    here = {"codes_ptr": "*fp8e4nv", "turned_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    yield Case("fp8 cast weight blocks", kernel, {"LIMIT": 448.0, "BLOCK": fp8_blocks_triton.BLOCK}, warps, types=here)


MASKS: dict[str, dict[str, bool]] = {
    "full": {},
    "causal": {"CAUSAL": True},
    "window": {"WINDOW": True},
    "causal window": {"CAUSAL": True, "WINDOW": True},
    "documents": {"CAUSAL": True, "TABLE": True},
    "softcap": {"CAUSAL": True, "SOFTCAP": True},
}


def attention_case(what: str, width: int, target: int, mask: str, *special: str) -> Case:
    kernel, table = {
        "forward": (flash.forward_kernel, launches.FORWARD),
        "dkdv": (flash.dkdv_kernel, launches.DKDV),
        "dq": (flash.dq_kernel, launches.DQ),
    }[what]
    kind = KINDS.get(target, launches.SMALL)
    descriptors = kind == launches.HOPPER
    block_m, block_n, warps, stages = launches.tiles(table, width, 2, kind)
    block_d = launches.head_block(width)
    constants: dict[str, Any] = {
        **dict.fromkeys(("CAUSAL", "WINDOW", "TABLE", "SOFTCAP"), False), **MASKS[mask], **ones(*special),
        "DESCRIPTORS": descriptors, "PRECISION": "tf32", "BLOCK_M": block_m, "BLOCK_N": block_n, "WIDTH": width,
        "BLOCK_D": block_d,
    }  # fmt: skip
    if mask != "documents":
        constants["table"] = None
    types = {"table": "*i32"}
    for name, rows in (("q", block_m), ("dout", block_m), ("k", block_n), ("v", block_n)):
        types[name] = f"tensordesc<bf16[1,1,{rows},{block_d}]>" if descriptors else "*bf16"
    name = f"attention {what} d{width} {mask}{' ones' if special else ''}"
    return Case(name, kernel, constants, warps, stages, types, products=True)


def delta_case(width: int, has_dlse: bool) -> Case:
    block_m, warps = launches.DELTA
    constants = {"HAS_DLSE": has_dlse, "BLOCK_M": block_m, "WIDTH": width, "BLOCK_D": launches.head_block(width)}
    types = {"dlse_ptr": "*fp32"}
    if not has_dlse:
        constants["dlse_ptr"] = None
    return Case(f"attention delta d{width}{' with dlse' if has_dlse else ''}", flash.delta_kernel, constants, warps,
                types=types)  # fmt: skip


def attention_cases(target: int) -> Iterator[Case]:
    """Every mask at the usual head width, every width with the usual mask, and what a launch of single heads makes."""
    masks, widths = list(MASKS), [16, 32, 64, 80, 192, 256]
    if target not in (80, 90):
        masks, widths = ["causal", "documents"], [16, 32, 64, 256]
    yield from (delta_case(width, has_dlse) for width, has_dlse in ((128, False), (80, True), (256, False)))
    for what in ("forward", "dkdv", "dq"):
        yield from (attention_case(what, 128, target, mask) for mask in masks)
        yield from (attention_case(what, width, target, "causal") for width in widths)
        if target == 90:
            yield attention_case(what, 64, target, "causal", "queries", "keys", "heads", "group")


def decode_cases() -> Iterator[Case]:
    """One query: every head width, in parts and whole; window and soft cap; a key/value head to each query head."""
    types = {"first_ptr": "*i64", "count_ptr": "*i64"}
    shared = {"WINDOW": False, "SOFTCAP": False, "PRECISION": "tf32", "BLOCK_G": decode.LEAST_ROWS}
    kinds: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("", {}, "*fp32"),
        (" whole", {}, "*bf16"),
        (" window", {"WINDOW": True}, "*fp32"),
        (" softcap", {"SOFTCAP": True}, "*fp32"),
        (f" {decode.MOST_ROWS} heads", {"BLOCK_G": decode.MOST_ROWS}, "*fp32"),
        (" one head", ones("group"), "*fp32"),
    )
    for width in (16, 32, 64, 80, 128, 256):
        block = {"WIDTH": width, "BLOCK_D": launches.head_block(width)}
        for name, special, out in kinds if width in (128, 256) else kinds[:1]:
            constants = {**shared, "BLOCK_N": decode.tile_keys(width, 2), **block, **special}
            here = {**types, "out_ptr": out}
            yield Case(f"decode d{width}{name}", decode.decode_kernel, constants, decode.WARPS, decode.STAGES, here)
        warps = warps_for(decode.MOST_PARTS * block["BLOCK_D"])
        here = {"part_ptr": "*fp32"}
        yield Case(
            f"decode combine d{width}", decode.combine_kernel, {"PARTS": decode.MOST_PARTS, **block}, warps, types=here
        )


def specialised_case(what: str, width: int, mask: str) -> Case:
    """A kernel of the attention with specialised warps; what is not in the ring has tiles of 64 rows."""
    if what == "forward":
        kernel, ring, own = gluon_kernels.forward_kernel, "k v", "q out"
        rows, stages = gluon.TILES[width]
    elif what == "dkdv":
        kernel, ring, own = gluon_backward.dkdv_kernel, "q dout", "k v dk dv"
        rows, stages = gluon.BACKWARD_TILES[width][0]
    else:
        kernel, ring, own = gluon_backward.dq_kernel, "k v", "q dout dq"
        rows, stages = gluon.BACKWARD_TILES[width][1]
    block = "BLOCK_M" if what == "dkdv" else "BLOCK_N"
    constants: dict[str, Any] = {"STAGES": stages, block: rows, "WIDTH": width}
    constants |= {**dict.fromkeys(("CAUSAL", "WINDOW", "TABLE"), False), **MASKS[mask]}
    if mask != "documents":
        constants["table"] = None
    types = {"table": "*i32"}
    for names, height in ((own, 64), (ring, rows)):
        layout = gluon.shared_layout(height, width, torch.bfloat16)
        types |= dict.fromkeys(names.split(), f"tensordesc<bf16[{height}, {width}],{layout!r}>")
    return Case(f"attention specialised {what} d{width} {mask}", kernel, constants, 4, 0, types, products=True)


def specialised_cases() -> Iterator[Case]:
    """Every head width, and every mask at the usual one."""
    for what, widths in (("forward", gluon.TILES), ("dkdv", gluon.BACKWARD_TILES), ("dq", gluon.BACKWARD_TILES)):
        yield from (specialised_case(what, width, "causal") for width in widths)
        yield from (specialised_case(what, 128, mask) for mask in ("causal window", "documents"))


def cases(target: int, quick: bool) -> list[Case]:
    if quick:
        wanted = [case for case in norm_cases() if "h4096" in case.name]
        return [*wanted, attention_case("forward", 128, target, "causal")]
    products = [*grouped_cases(), *symmetric_cases(), *(fp8_cases() if target >= 89 else ())]  # 8-bit floats
    attention = [*attention_cases(target), *decode_cases()]
    made = [*norm_cases(), *pointwise_cases(), *loss_cases(), *products, *attention]
    if target == 90:
        made += specialised_cases()
    # sm_86 is sm_89 without 8-bit floats, and what needs little shared memory is compiled for the others already.
    needed = ("fp8", "decode")
    return [case for case in made if case.products or case.name.startswith(needed)] if target in (86, 89, 120) else made


def measured(target: int, quick: bool, index: int) -> dict[str, Any]:
    """What the compiler made of one case; runs in a worker process, which finds the case by its number."""
    case = cases(target, quick)[index]
    made = compiled(case, target)
    used, ptx = resources(made.asm["cubin"]), made.asm["ptx"]
    kinds = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor", "setmaxnreg")
    counts = {kind: ptx.count(kind) for kind in kinds}
    return {
        "target": f"sm_{target}", "case": case.name, "warps": case.warps, "stages": case.stages,
        "registers": used["REG"], "stack": used["STACK"], "shared": made.metadata.shared, "products": case.products,
        "instructions": {kind: count for kind, count in counts.items() if count},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    kinds = " ".join(f"{kind}x{count}" for kind, count in row["instructions"].items())
    return (
        f"{row['target']:<7}{row['case']:<38}{row['warps']:>3} warps {row['registers']:>4} registers "
        f"{row['stack']:>5} stack {row['shared']:>7} shared  {kinds}"
    ).rstrip()


def faults(row: dict[str, Any], allowance: dict[str, Any]) -> list[str]:
    """What is wrong with a row; sm_100 has to compile, nothing is tuned for it."""
    target = int(row["target"].removeprefix("sm_"))
    if target == 100:
        return []
    label, wrong = f"{row['target']} {row['case']}", []
    granted = max((entry["stack"] for name, entry in allowance.items() if fnmatchcase(label, name)), default=0)
    if row["stack"] > granted:
        wrong.append(f"{label}: {row['stack']} bytes of stack, {granted} allowed")
    limit = launches.SHARED_MEMORY[KINDS.get(target, launches.SMALL)]
    if row["shared"] > limit:
        wrong.append(f"{label}: {row['shared']} bytes of shared memory, the device has {limit}")
    if row["products"] and target == 90 and "wgmma.mma_async" not in row["instructions"]:
        wrong.append(f"{label}: no wgmma")
    for needed in ("setmaxnreg", "cp.async.bulk.tensor") if "specialised" in label else ():
        if needed not in row["instructions"]:
            wrong.append(f"{label}: no {needed}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="norms and the attention forward on sm_90 only")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    options = parser.parse_args()
    allowance = tomllib.loads(ALLOWANCE.read_text())
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1 if options.quick else os.cpu_count()) as pool:
        for target in (90,) if options.quick else TARGETS:
            work = partial(measured, target, options.quick)
            for row in pool.map(work, range(len(cases(target, options.quick)))):
                rows.append(row)
                print(line(row), flush=True)
    wrong = [fault for row in rows for fault in faults(row, allowance)]
    if options.json:
        document = {"triton": triton.__version__, "command": "python -m tests.kernels.compile_matrix", "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(wrong) or "every configuration is within its limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, within ten minutes:
#
#   bash benchmarks/gpu_session.sh [options] [SECTION ...]
#
#   suite    the kernels' tests, natively
#   rule     FlashAttention's rule: errors at most twice those of torch's own bf16 formula
#   repeats  30 runs, equal to the bit
#   step     a whole training step, kernels against references
#   speed    benchmarks/kernels.py
#
#   --out DIR      results (default benchmarks/results): session.json, session.log, kernels_cuda_bfloat16.{json,txt,png}
#   --wheels DIR   wheels of packages that the machine lacks (pytest, liger-kernel, ...), installed into a scratch place
#   --budget S     seconds for all sections together (default 560); what one leaves of its share goes to the next
#
# Needs a Python with torch, triton and pytest ($PYTHON, default python3). Where megalite is not installed, it is copied
# to a scratch directory and its C++ part is built there. Sections are independent: a failure is recorded, and the next
# begins. Exits 1 if any failed.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PYTHON=${PYTHON:-python3}
OUT=$ROOT/benchmarks/results WHEELS='' BUDGET=560
declare -A SHARE=([suite]=170 [rule]=80 [repeats]=50 [step]=60 [speed]=200)
chosen=()

refuse() {
    echo "error: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels | --budget)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            case $1 in --out) OUT=$2 ;; --wheels) WHEELS=$2 ;; --budget) BUDGET=$2 ;; esac
            shift 2
            ;;
        suite | rule | repeats | step | speed) chosen+=("$1") && shift ;;
        *) refuse "$1: no such section or option; sections are suite, rule, repeats, step, speed" ;;
    esac
done
[[ $BUDGET =~ ^[0-9]+$ ]] || refuse "--budget $BUDGET: a whole number of seconds"
[ -z "$WHEELS" ] || [ -d "$WHEELS" ] || refuse "--wheels $WHEELS: no such directory"
[ ${#chosen[@]} -gt 0 ] || chosen=(suite rule repeats step speed)
mkdir -p "$OUT" || refuse "--out $OUT: cannot be made"
OUT=$(cd "$OUT" && pwd -P)
WHEELS=${WHEELS:+$(cd "$WHEELS" && pwd -P)}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
START=$SECONDS
: > "$OUT/session.log"
exec > >(tee -a "$OUT/session.log") 2>&1

if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl ||
        refuse "the wheels in $WHEELS do not install"
    export PYTHONPATH=$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
fi
cd "$ROOT" || exit
if ! "$PYTHON" -c 'import megalite.kernels, megalite.data._index' 2> /dev/null; then
    mkdir "$SCRATCH/megalite"
    cp -r megalite kernels tests benchmarks setup.py pyproject.toml README.md LICENSE "$SCRATCH/megalite"
    cd "$SCRATCH/megalite" || exit
    cp -r kernels megalite/kernels
    "$PYTHON" setup.py -q build_ext --build-lib . || echo "the C++ part does not build: the section step will fail"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" -c 'import torch, triton; assert torch.cuda.is_available()' ||
    refuse "$PYTHON has no torch with a CUDA device, or no triton"

tests() { # NAME WHAT...: the kernels' suite, a report under NAME
    local name=$1 parallel=()
    shift
    "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 6) # compiling is what takes time
    "$PYTHON" -m pytest -q -m gpu --tb=short -p no:cacheprovider "${parallel[@]}" \
        --junitxml "$SCRATCH/$name.xml" -o junit_family=xunit1 "$@"
}

section() {
    case $1 in
        suite) tests suite tests/kernels/suite -k 'not twice and not bitwise and not train' ;;
        rule) tests rule tests/kernels/suite/test_attention_kernels.py -k twice ;;
        repeats) tests repeats tests/kernels/suite -k bitwise ;;
        step) tests step tests/kernels/suite/test_training_step.py ;;
        speed) "$PYTHON" benchmarks/kernels.py --device cuda --out "$OUT" ;;
    esac
}
export -f section tests
export PYTHON OUT SCRATCH
unset TRITON_INTERPRET

spare=0 failed=0
for name in "${chosen[@]}"; do
    left=$((BUDGET - (SECONDS - START)))
    limit=$((SHARE[$name] + spare))
    [ $limit -lt $left ] || limit=$left
    begin=$SECONDS
    if [ "$limit" -lt 10 ]; then
        status=124
    else
        echo "== $name (at most $limit s)"
        timeout --kill-after=5 "$limit" bash -c "section $name"
        status=$?
    fi
    took=$((SECONDS - begin))
    spare=$((limit > took ? limit - took : 0))
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit $status after $took s"
    echo "$name $status $took" >> "$SCRATCH/sections"
done

COMMIT=$(git -C "$ROOT" rev-parse HEAD 2> /dev/null) "$PYTHON" - "$SCRATCH" "$OUT/session.json" << 'PYTHON'
import json, os, sys
from pathlib import Path
from xml.etree import ElementTree

import torch, triton

scratch, target = Path(sys.argv[1]), Path(sys.argv[2])
summary = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
           "commit": os.environ.get("COMMIT") or "unknown", "command": "bash benchmarks/gpu_session.sh", "sections": {}}
for line in (scratch / "sections").read_text().splitlines():
    name, status, took = line.split()
    section = {"exit": int(status), "timed_out": status in ("124", "137"), "seconds": int(took)}
    report = scratch / f"{name}.xml"
    if report.exists():
        cases = list(ElementTree.parse(report).iter("testcase"))
        for outcome in ("failure", "error", "skipped"):
            section[outcome] = [case.get("name") for case in cases if case.find(outcome) is not None]
        section["tests"] = len(cases)
        section["measured"] = {
            f"{case.get('name')} {p.get('name')}": p.get("value") for case in cases for p in case.iter("property")
        }
    summary["sections"][name] = section
part = target.with_suffix(".part")
part.write_text(json.dumps(summary, indent=1) + "\n")
part.replace(target)
print(json.dumps({name: {"exit": s["exit"], "tests": s.get("tests")} for name, s in summary["sections"].items()}))
PYTHON
exit $failed

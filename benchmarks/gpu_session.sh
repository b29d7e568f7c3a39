#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes:
#
#   bash benchmarks/gpu_session.sh [options] [SECTION ...]
#
#   run      a tiny run from its first step to a generated token: benchmarks/gpu_run.py
#   train    benchmarks/train.py: Llama 8B's shape, 1.24 B and GPT-2's 1.5 B, FP8, recomputation, the plain yardstick
#   rollouts benchmarks/gpu_rollouts.py: the trainer's own generation
#   step     a whole training step, kernels against references; the tests of data, timing and profiles that need a GPU
#   suite    the kernels' tests, natively
#   rule     FlashAttention's rule: errors at most twice those of torch's own bf16 formula
#   repeats  30 runs, equal to the bit
#   speed    benchmarks/kernels.py
#
#   --out DIR      results (default benchmarks/results): session.json (written anew after every section), session.log,
#                  run.json, train_MODEL.json, rollouts.json, kernels_cuda_bfloat16.{json,txt,png}
#   --wheels DIR   wheels of packages that the machine lacks (pytest, liger-kernel, ...), installed into a scratch place
#   --budget S     seconds for all sections together (default 530); what one leaves of its share goes to the next
#   --device cpu   rehearse without a GPU: the kernels in Triton's interpreter, the rest on the CPU with small models
#
# Needs a Python with torch, triton, numpy, rich and pytest ($PYTHON, default python3); what else megalite depends on
# is either not used here or brought along (benchmarks/stand_ins). Where megalite is not installed, it is copied to a
# scratch directory and its index builder is compiled there, with torch's own copy of pybind11 where there is no
# other. Sections are independent: a failure is recorded, and the next begins. Exits 1 if any failed.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PYTHON=${PYTHON:-python3}
OUT=$ROOT/benchmarks/results WHEELS='' BUDGET=530 DEVICE=cuda
SECTIONS=(run train rollouts step suite speed rule repeats)
declare -A SHARE=([run]=80 [train]=165 [rollouts]=30 [step]=35 [suite]=90 [speed]=70 [rule]=35 [repeats]=25)
WHOLE=530 # the sum of the shares
chosen=()

refuse() {
    echo "error: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --out | --wheels | --budget | --device)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            case $1 in --out) OUT=$2 ;; --wheels) WHEELS=$2 ;; --budget) BUDGET=$2 ;; --device) DEVICE=$2 ;; esac
            shift 2
            ;;
        *)
            [ -n "${SHARE[$1]:-}" ] || refuse "$1: no such section or option; sections are ${SECTIONS[*]}"
            chosen+=("$1") && shift
            ;;
    esac
done
[[ $BUDGET =~ ^[0-9]+$ ]] || refuse "--budget $BUDGET: a whole number of seconds"
[[ $DEVICE =~ ^(cuda|cpu)$ ]] || refuse "--device $DEVICE: cuda or cpu"
[ -z "$WHEELS" ] || [ -d "$WHEELS" ] || refuse "--wheels $WHEELS: no such directory"
[ ${#chosen[@]} -gt 0 ] || chosen=("${SECTIONS[@]}")
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

build() { # the index builder beside its source: with pybind11, or with the headers that torch brings
    "$PYTHON" setup.py -q build_ext --build-lib . && return
    local flags
    flags=$("$PYTHON" -c 'import sysconfig as s, torch.utils.cpp_extension as c
print(s.get_config_var("EXT_SUFFIX"), "-I" + s.get_path("include"), *("-I" + path for path in c.include_paths()))') ||
        return
    # shellcheck disable=SC2086 # a list of options
    "${CXX:-g++}" -O2 -std=c++17 -shared -fPIC ${flags#* } megalite/data/_index.cpp -o "megalite/data/_index${flags%% *}"
}

cd "$ROOT" || exit
if ! "$PYTHON" -c 'import megalite.kernels, megalite.data._index' 2> /dev/null; then
    mkdir "$SCRATCH/megalite"
    cp -r megalite kernels tests tools launch benchmarks setup.py pyproject.toml README.md LICENSE "$SCRATCH/megalite"
    cd "$SCRATCH/megalite" || exit
    cp -r kernels megalite/kernels
    build || echo "the index builder does not compile: the sections run and step will fail"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
if ! "$PYTHON" -c 'import tomli_w' 2> /dev/null; then
    export PYTHONPATH=$PWD/benchmarks/stand_ins${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" -c "import torch, triton; assert '$DEVICE' == 'cpu' or torch.cuda.is_available()" ||
    refuse "$PYTHON has no torch with a CUDA device, or no triton (--device cpu rehearses without a GPU)"

tests() { # NAME WHAT...: tests that need a GPU, a report under NAME
    local name=$1 parallel=() marked=(-m gpu)
    shift
    "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 6) # compiling is what takes time
    [ "$DEVICE" = cuda ] || marked=()
    "$PYTHON" -m pytest -q "${marked[@]}" --tb=short -p no:cacheprovider --continue-on-collection-errors \
        "${parallel[@]}" --junitxml "$SCRATCH/$name.xml" -o junit_family=xunit1 "$@"
}

rows() { # MODEL SECONDS ROW...: a model's turns; it begins none later, and what it has measured stays
    local model=$1 seconds=$2
    shift 2
    "$PYTHON" benchmarks/train.py --model "$model" --device "$DEVICE" --rounds 1 --warmup 2 --steps 4 \
        --budget "$seconds" --output "$OUT/train_$model" --rows "$@"
}

training() { # SECONDS: each model for itself, so that one which fails or takes long leaves the others their time
    local bf16=megalite,precision=bf16 plain=plain,precision=bf16 failed=0
    if [ "$DEVICE" = cpu ]; then
        rows 10m "$1" $bf16 $plain # without FP8, whose products take minutes on a CPU
        return
    fi
    rows llama3-8b $(($1 * 6 / 10)) $bf16 $plain,compile=1 $bf16,fp8=row $bf16,fp8=tensor $bf16,recompute=selective ||
        failed=1
    rows 1.24b $(($1 * 2 / 10)) $bf16 $plain,compile=1 $bf16,cuda_graph=1 || failed=1
    rows gpt2-1.5b $(($1 * 2 / 10)) $bf16 $plain,compile=1 $bf16,cuda_graph=1 || failed=1
    return $failed
}

section() { # NAME SECONDS
    local suite=tests/kernels/suite others=(tests/data tests/report)
    [ "$DEVICE" = cuda ] || others=()
    case $1 in
        run) env -u TRITON_INTERPRET "$PYTHON" benchmarks/gpu_run.py --device "$DEVICE" --out "$OUT" ;;
        train) (unset TRITON_INTERPRET && training "$2") ;;
        rollouts) env -u TRITON_INTERPRET "$PYTHON" benchmarks/gpu_rollouts.py --device "$DEVICE" --out "$OUT" ;;
        step) tests step $suite/test_training_step.py "${others[@]}" ;;
        suite) tests suite $suite -k 'not twice and not bitwise and not train' ;;
        rule) tests rule $suite/test_attention_kernels.py $suite/test_specialised_attention.py -k twice ;;
        repeats) tests repeats $suite -k bitwise ;;
        speed) "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --out "$OUT" ;;
    esac
}

summarise() { # what is known so far, as session.json
    COMMIT=$(git -C "$ROOT" rev-parse HEAD 2> /dev/null) "$PYTHON" - "$SCRATCH" "$OUT/session.json" << 'PYTHON'
import json, os, sys
from pathlib import Path
from xml.etree import ElementTree

import torch, triton

scratch, target = Path(sys.argv[1]), Path(sys.argv[2])
device = torch.cuda.get_device_name() if os.environ["DEVICE"] == "cuda" else "cpu"
summary = {"device": device, "torch": torch.__version__, "triton": triton.__version__,
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
PYTHON
}

export -f section tests training rows
export PYTHON OUT SCRATCH DEVICE
unset TRITON_INTERPRET
[ "$DEVICE" = cuda ] || export TRITON_INTERPRET=1

spare=0 failed=0
for name in "${chosen[@]}"; do
    left=$((BUDGET - (SECONDS - START)))
    limit=$((SHARE[$name] * BUDGET / WHOLE + spare))
    [ $limit -lt $left ] || limit=$left
    begin=$SECONDS
    if [ "$limit" -lt 10 ]; then
        status=124
    else
        echo "== $name (at most $limit s)"
        timeout --kill-after=5 "$limit" bash -c "section $name $((limit - 3))"
        status=$?
    fi
    took=$((SECONDS - begin))
    spare=$((limit > took ? limit - took : 0))
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit $status after $took s"
    echo "$name $status $took" >> "$SCRATCH/sections"
    summarise
done
exit $failed

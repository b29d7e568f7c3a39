# Sourced by the scripts of this repository: finds or makes the Python environment in which megalite runs.
#
#   prepare_environment [EXTRA]   .venv at the root of the repository with megalite (and pip's extra, as `dev`) installed
#                                 in place; sets PYTHON. A second call finds everything done and takes no time.
#
# An active virtual environment (or conda environment, or a container's Python) that has torch lends it: .venv then sees
# that environment's packages and adds only what is missing, and the environment itself stays as it is. Otherwise torch
# is installed, pinned by constraints-cpu.txt where no GPU is seen.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s\n' "$*" >&2; }

refuse() {
    say "error: $*"
    exit 2
}

gpu_is_seen() {
    [ -e /dev/nvidia0 ] || [ -e /dev/nvidiactl ] || { command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; }
}

# The Python to build on: the active environment's, or the first on the path that is new enough.
base_python() {
    local candidate
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        $(type -aP python3) python3.14 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] || continue
        # .venv itself may be first on the path, without being active
        [ "$(dirname "$(command -v "$candidate" || true)")" != "$ROOT/.venv/bin" ] || continue
        if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    refuse "Python 3.11 or newer is needed, and neither the active environment nor python3 is that new; install one"
}

# The directory that holds torch for this Python, if there is one that megalite accepts.
torch_of() {
    "$1" - << 'PYTHON' 2> /dev/null
import importlib.metadata as metadata
import re
distribution = metadata.distribution("torch")
if tuple(map(int, re.match(r"(\d+)\.(\d+)", distribution.version).groups())) >= (2, 11):
    print(distribution.locate_file(""))
PYTHON
}

check_compiler() {
    command -v "${CXX:-c++}" > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null ||
        refuse "no C++ compiler (c++, g++ or clang++) is on the path; install one (Debian and Ubuntu: apt install g++)"
    "$1" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2> /dev/null ||
        refuse "$1 has no C headers (Python.h); install them (Debian and Ubuntu: apt install python3-dev)"
}

install_megalite() {
    local extra=$1 lent=$2
    local options=(--quiet --disable-pip-version-check --no-compile --no-warn-script-location)
    if [ -n "$lent" ]; then
        # torch stays what it is, whatever else is installed beside it
        "$PYTHON" "$ROOT/launch/lent.py" "$ROOT/.venv" "$extra" &&
            "$PYTHON" -m pip install "${options[@]}" --constraint "$ROOT/.venv/lent.txt" \
                --requirement "$ROOT/.venv/wanted.txt" &&
            "$PYTHON" -m pip install "${options[@]}" --no-deps --editable "$ROOT" && return
    else
        gpu_is_seen || options+=(--constraint "$ROOT/constraints-cpu.txt")
        "$PYTHON" -m pip install "${options[@]}" --editable "$ROOT${extra:+[$extra]}" && return
    fi
    refuse "the installation failed; what pip says above tells why (is the package registry within reach?)"
}

prepare_environment() {
    local extra=${1:-} base lent stamp
    base=$(base_python) || exit 2
    lent=$(torch_of "$base" || true)
    PYTHON=$ROOT/.venv/bin/python
    local state=$ROOT/.venv/megalite-${extra:-run}.stamp
    stamp=$(printf '%s\n' "$ROOT" "$lent" && cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/constraints-cpu.txt" \
        "$ROOT"/megalite/*/*.cpp "$ROOT"/kernels/cpu/*)
    if [ -x "$PYTHON" ] && [ -f "$state" ] && [ "$(cat "$state")" = "$stamp" ]; then
        return
    fi
    check_compiler "$base"
    if [ -x "$PYTHON" ] && [ "$(cat "$ROOT/.venv/lender" 2> /dev/null)" != "$lent" ]; then
        say "torch now comes from elsewhere (${lent:-the package registry}): making .venv anew"
        rm -rf "$ROOT/.venv"
    fi
    if [ ! -x "$PYTHON" ]; then
        say "making .venv with $base${lent:+, which lends its torch}"
        "$base" -m venv --clear "$ROOT/.venv" > /dev/null ||
            refuse "$base cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)"
        if [ -n "$lent" ]; then
            printf '%s\n' "$lent" > "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/lent.pth"
        fi
        printf '%s' "$lent" > "$ROOT/.venv/lender"
    fi
    say "installing megalite in .venv"
    install_megalite "$extra" "$lent"
    printf '%s\n' "$stamp" > "$state"
}

# Sets PYTHON to the one that has this checkout's megalite installed: the active environment's, or .venv's, which is made
# if there is neither.
find_python() {
    local candidate
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" python3; do
        [ -n "$candidate" ] || continue
        if [ "$(cd / && "$candidate" -c 'import megalite; print(megalite.__path__[0])' 2> /dev/null)" = "$ROOT/megalite" ]
        then
            PYTHON=$candidate
            return
        fi
    done
    prepare_environment
}

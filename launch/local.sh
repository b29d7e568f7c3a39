#!/usr/bin/env bash
# Train on this machine: bash launch/local.sh RECIPE.toml [--processes N] [--SECTION.FIELD VALUE ...]
#
# Checks the configuration, then runs one rank on each GPU, or, without GPUs, as many as the layout needs. See local.py.
set -euo pipefail
trap "exit 75" TERM USR1 HUP

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

# A request to stop waits until local.py listens, whenever it comes.
before=()
! env --block-signal=TERM true 2> /dev/null || before=(env "--block-signal=TERM,USR1,HUP,INT")
exec "${before[@]}" "$PYTHON" "$ROOT/launch/local.py" "$@"

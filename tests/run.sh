#!/usr/bin/env bash
# The test suite: bash tests/run.sh [pytest arguments]
#
#   bash tests/run.sh                 everything that this machine's hardware allows, but for the tier marked slow
#   bash tests/run.sh -m fast         the two-minute tier
#   bash tests/run.sh -m slow         the long matrices of faults, SLURM and compilation
#   bash tests/run.sh tests/test_config.py -k ramp
#
# What is more than single files runs on all cores (-n 0: on one); so long as it is not told, with `-m gpu`, to keep to
# the GPU. The environment .venv is made if it is missing. The summary names every test that was skipped, with the reason.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
prepare_environment dev
cd "$ROOT"
bash tests/slurm/install.sh

chosen=("$@")
tier_is_chosen=no
spread=(-n logical --maxprocesses 8)
for argument in "$@"; do
    case $argument in -m | -m?* | *::*) tier_is_chosen=yes ;; esac
    case $argument in gpu | -n* | --pdb | *.py | *::*) spread=() ;; esac
done
if [ $tier_is_chosen = no ]; then
    say "leaving out the tests marked slow; bash tests/run.sh -m slow runs them"
    chosen=(-m "not slow" "$@")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest "${spread[@]}" "${chosen[@]}"

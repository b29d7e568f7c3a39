#!/usr/bin/env bash
# Train on this machine: bash launch/local.sh RECIPE.toml [--processes N] [--SECTION.FIELD VALUE ...]
#
# Checks the configuration, then runs one rank on each GPU, or, without GPUs, as many as the layout needs. See local.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
exec "$PYTHON" "$ROOT/launch/local.py" "$@"

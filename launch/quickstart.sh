#!/usr/bin/env bash
# From a fresh clone to a trained model in one command: bash launch/quickstart.sh
#
#   --input FILE...            the user's own text (.txt, .jsonl, .parquet, globs, directories); by default the source of
#                              Python's standard library, which every machine with Python has
#   --device auto|cpu|cuda     where to train (default auto: the GPUs if there are any)
#   --processes N              ranks (default: one for each GPU, or 4 on the CPU, as tensor 2 x pipeline 2)
#   --chat                     then fine-tune the model on conversations, improve its answers with GRPO, print a dialogue
#   --steps N                  optimizer steps (of each stage)
#   --out DIR                  where everything goes (default runs/quickstart); a second call starts afresh
#
# Makes .venv if it is missing, trains a tokenizer, writes token files, trains a small Llama, draws the loss curve, prints
# a sample and the bits per byte on files that were held out. See quickstart.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare_environment
exec "$PYTHON" "$ROOT/launch/quickstart.py" "$@"

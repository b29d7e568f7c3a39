#!/usr/bin/env bash
# One rank of a SLURM job: srun … bash launch/entry.sh COMMAND ARGUMENT...
#
# Tells COMMAND its place from SLURM's numbering, which keeps the ranks of a node together and in order, and translates
# how it ends: SLURM kills the other ranks once one ends with a code other than 0, and some may still have to leave.
#
#   75, stopped with a checkpoint  becomes 0; rank 0 writes it to the file MEGALITE_OUTCOME, where the job's script looks
#   2, unusable configuration      stays, and is written there too: ranks that SLURM kills end with other codes
#   anything else                  stays, with a line that names the rank and the node; the first to fail writes it there,
#                                  because srun tells the highest code of all, which may be that of a rank it killed
set -u

: "${SLURM_PROCID:?this is run by srun, once for each rank}" "${MEGALITE_OUTCOME:?}"
: "${MASTER_ADDR:?}" "${MASTER_PORT:?}"
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
ulimit -Sn "$(ulimit -Hn)"

# Kernels are compiled once on a node, and not by all ranks into one directory on a network. Whoever could write there
# could run code as us: it must be our own.
if [ -z "${TRITON_CACHE_DIR:-}" ]; then
    cache=${TMPDIR:-/tmp}/megalite-triton-$(id -u)
    mkdir -m 700 "$cache" 2> /dev/null
    if [ -O "$cache" ] && [ ! -L "$cache" ]; then
        export TRITON_CACHE_DIR=$cache
    fi
fi

# A request to stop must not kill a rank that still imports its libraries: it is ignored until the trainer listens, and
# the job's script repeats it. SIGTERM is the trainer's own affair; this shell stays to translate.
trap '' USR1
trap : TERM

"$@"
code=$?

case $code in
    0) ;;
    75)
        [ "$RANK" != 0 ] || echo 75 > "$MEGALITE_OUTCOME" || exit 75
        exit 0
        ;;
    2) echo 2 > "$MEGALITE_OUTCOME" ;;
    *)
        how="ended with code $code"
        if [ "$code" -gt 128 ]; then
            how="was ended by SIG$(kill -l $((code - 128)))"
        fi
        (set -o noclobber && echo "$code" > "$MEGALITE_OUTCOME") 2> /dev/null
        echo "error: rank $RANK on ${SLURMD_NODENAME:-$(hostname)} $how" >&2
        ;;
esac
exit "$code"

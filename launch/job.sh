# ----------------------------------------------------------------------------------------------------------------------
# From here on the script of every job is the same: launch/job.sh. What it does, in order:
#   leaves at once if the training has finished; looks at every node; runs one task for each rank and waits;
#   hands a request to stop (near the time limit, or from you) on to the ranks, which save a checkpoint and end;
#   then decides: finished, unusable, or once more from the newest checkpoint, in this same job (scontrol requeue).
# SLURM itself starts a job again after a lost node only: not after a time limit, and not after an orderly exit.
set -uo pipefail

restart=${SLURM_RESTART_COUNT:-0}
start=$SLURM_JOB_ID-r$restart # names this start in every log
logs=$RUN/log/slurm-$start-rank_
failures=$RUN/launch/$SLURM_JOB_ID.failures
export MEGALITE_OUTCOME=$RUN/launch/$start.outcome # where rank 0 tells how the training ended, see entry.sh
stopping=""                                        # the signal that asked to stop
stopped_at=0
overdue=""
repeater="" # the process that repeats the request

say() { printf '%s %s: %s\n' "$(date '+%F %T')" "$start" "$*"; }

newest_checkpoint() {
    find "$RUN/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.*' -printf '%f\n' 2> /dev/null | sort -V | tail -n 1
}

# The first request counts; it is repeated until the step has ended, because ranks that are still starting miss it.
# Whoever repeats it must end with this script, however that ends: a job that comes back has the same number.
# SIGTERM once the time limit has passed means that SLURM kills everything within seconds, this script too.
# shellcheck disable=SC2317 # called by the traps
request_stop() {
    interrupted=yes
    if [ "$1" = TERM ] && [ "$ends" -gt 0 ] && [ "$(date +%s)" -ge "$ends" ]; then
        overdue=yes
    fi
    [ -z "$stopping" ] || return 0
    stopping=$1 stopped_at=$(date +%s)
    say "SIG$1: asking the ranks to save a checkpoint and stop"
    repeat_request &
    repeater=$!
}

# shellcheck disable=SC2317
repeat_request() {
    local steps said
    while kill -0 $$ 2> /dev/null; do
        steps=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | sed -n 's/ megalite-.*//p')
        for step in $steps; do
            # A step may end between the two commands: nothing is left to ask then.
            said=$(scancel --signal=USR1 "$step" 2>&1) || [[ ${said,,} =~ "already complet"|"invalid job id" ]] ||
                say "step $step could not be asked, once more in 10 s: $said"
        done
        sleep 10
    done
}

stop_repeating() {
    [ -z "$repeater" ] || kill "$repeater" 2> /dev/null
    repeater=""
}

# Where rank 0 shall listen: at the address by which this node, the first, reaches the second, and on no other network;
# on one node not beyond it. A name leads to the same place, but has rank 0 listen on all networks.
meeting_address() {
    local first second peer
    { read -r first && read -r second; } < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
        echo 127.0.0.1
    elif ! peer=$(getent ahostsv4 "$second" | awk '{ print $1; exit }') || [ -z "$peer" ] ||
        ! ip -4 route get "$peer" 2> /dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p' | grep .; then
        echo "$first"
    fi
}

# run_step NAME SRUN-OPTION... COMMAND...: one srun to its end, whatever signals arrive meanwhile.
run_step() {
    local name=$1 code pid
    shift
    srun --job-name="megalite-$name" --ntasks="$RANKS" --wait=60 "${SRUN[@]}" "$@" &
    pid=$!
    while :; do
        interrupted=""
        wait "$pid"
        code=$?
        [ -n "$interrupted" ] || return "$code"
        [ -z "$overdue" ] || end_overdue
    done
}

# The ranks' complaints. What many say is mostly an echo of what one says: the rare lines come first.
explain() {
    say "what the ranks said (whole: ${logs}*.out and $RUN/log/rank_*)"
    grep -hE '^error: |dead or hung|could not be saved|works longest' "$logs"*.out | awk '{
        message = $0
        sub(/^error: rank [0-9]+( on [^ ]+)?/, "", message)
        sub(/^\[rank [0-9]+\] /, "", message)
        gsub(/rank_[0-9]+[.]/, "", message)
        if (count[message]++ == 0) said[message] = $0
    }
    END {
        for (message in count) {
            echo = count[message] > 1 ? " (and " count[message] - 1 " more like it)" : ""
            printf "%d\t  %s%s\n", count[message], said[message], echo
        }
    }' | sort -n | cut -f 2- | head -n 20
}

# Gives this job back to the queue, or ends it with code $1 where that must not or cannot be. A job that was cancelled,
# and one that SLURM has given back already, are not RUNNING any more; one beyond its time limit says so.
start_again() {
    local job="" state reason restarts
    trap '' USR1 TERM INT # it is decided: the SIGTERM that comes with the requeue asks for nothing more
    for _ in 1 2 3 4 5 6; do
        job=$(scontrol show job --oneliner "$SLURM_JOB_ID") && break
        sleep 10
    done
    state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<< "$job")
    reason=$(sed -n 's/.* Reason=\(\S*\).*/\1/p' <<< "$job")
    restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<< "$job")
    if [ "$restarts" != "$restart" ] || { [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; }; then
        say "SLURM has ended this start ($state, restart $restarts): its affair, what comes next"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "given back to the queue; it goes on from ${newest:-the beginning}"
    else
        say "SLURM does not requeue this job: submit it again to go on from ${newest:-the beginning}"
    fi
    exit "$1"
}

# A start that failed: once more, unless MAX_REQUEUES of them in a row came to no new checkpoint. $1: code, $2: reason.
try_again() {
    local count=0
    [ "$newest" != "$oldest" ] || count=$(cat "$failures" 2> /dev/null || echo 0)
    count=$((count + 1))
    say "$2; failure $count since the last new checkpoint, $MAX_REQUEUES are forgiven"
    if ! echo "$count" > "$failures" || [ "$count" -gt "$MAX_REQUEUES" ]; then
        say "giving up; mend the cause and submit again to go on from ${newest:-the beginning}"
        exit "$1"
    fi
    start_again "$1"
}

at_time_limit() { [ "$ends" -gt 0 ] && [ "$stopped_at" -ge $((ends - SIGNAL_SECONDS - 90)) ]; }

# The time limit has passed, and the ranks have not managed to save.
end_overdue() {
    newest=$(newest_checkpoint)
    say "the time limit has passed before the ranks had stopped; more than --signal-seconds $SIGNAL_SECONDS may help"
    [ "$CHAINED" = no ] || exit 75
    [ "$newest" != "$oldest" ] || try_again 75 "no checkpoint was made in the whole time"
    start_again 75
}

# Stopped in order, with a checkpoint or before there was anything to save.
go_on_later() {
    if [ "$stopping" = INT ]; then
        say "stopped for good; submit again to go on from ${newest:-the beginning}"
        exit 75
    elif at_time_limit && [ "$CHAINED" = yes ]; then
        say "time is over; the next job of the chain goes on from ${newest:-the beginning}"
        exit 75
    elif at_time_limit && [ "$newest" = "$oldest" ]; then
        try_again 75 "the whole time limit passed without a new checkpoint"
    fi
    start_again 75
}

if [ -e "$SUBMISSION.finished" ]; then
    say "the training has finished: nothing to do"
    exit 0
fi
trap stop_repeating EXIT
trap 'request_stop USR1' USR1 # from SLURM near the time limit, or: scancel --batch --signal=USR1 JOB
trap 'request_stop TERM' TERM # preemption, a lost node
trap 'request_stop INT' INT   # scancel --batch --signal=INT JOB: save, stop, and do not come back

ends=$(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s 2> /dev/null || echo 0)
MASTER_ADDR=${HEAD:-$(meeting_address)}
# Below the ports that systems hand out by themselves, and another one for each job and restart.
MASTER_PORT=${PORT:-$((20000 + (SLURM_JOB_ID * 16 + restart) % 12000))}
export MASTER_ADDR MASTER_PORT
if [ -z "$MASTER_ADDR" ]; then
    say "scontrol does not tell the first host of $SLURM_JOB_NODELIST; give --master-addr"
    exit 1
fi
# The run directory's lock may be that of another job, which SLURM had to kill. Whether it is over, SLURM knows.
holder=$(sed -n 's/.*"job_id": "\([0-9]\{1,\}\)".*/\1/p' "$RUN/run.lock" 2> /dev/null)
if [ -n "$holder" ] && [ "$holder" != "$SLURM_JOB_ID" ]; then
    if state=$(squeue --noheader --jobs="$holder" --format=%T 2>&1) && [ -z "$state" ] ||
        [[ $state = *"Invalid job id"* ]]; then
        export MEGALITE_ENDED_JOB=$holder
    fi
fi
mkdir -p "$RUN/log"
rm -f "$MEGALITE_OUTCOME"
oldest=$(newest_checkpoint) newest=$oldest
place="$SLURM_JOB_NUM_NODES nodes $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
say "$place, from ${oldest:-the beginning}"
say "to follow: tail -F ${logs}00000.out"

if [ "$PREFLIGHT" = yes ]; then
    run_step preflight --kill-on-bad-exit=0 "${CONTAINER[@]}" "$PYTHON" "$REPOSITORY/tools/doctor.py" \
        --preflight "${RECIPE[@]}"
    code=$?
    [ -z "$stopping" ] || go_on_later
    if [ $code -eq 2 ]; then
        say "unusable configuration or input, named above: not started again"
        exit 2
    elif [ $code -ne 0 ]; then
        say "to keep off a node, once this job is pending: scontrol update JobId=$SLURM_JOB_ID ExcNodeList=NODE"
        try_again $code "the nodes are not fit, see above"
    fi
fi

[ -z "$stopping" ] || go_on_later
run_step train --kill-on-bad-exit=1 --unbuffered --output="${logs//%/%%}%5t.out" \
    "${CONTAINER[@]}" bash "$REPOSITORY/launch/entry.sh" "$PYTHON" -m megalite.train "${RECIPE[@]}"
code=$?
stop_repeating
code=$(cat "$MEGALITE_OUTCOME" 2> /dev/null || echo $code)
rm -f "$MEGALITE_OUTCOME"
newest=$(newest_checkpoint)

case $code in
    0)
        : > "$SUBMISSION.finished"
        say "finished"
        exit 0
        ;;
    2)
        explain
        say "unusable configuration or input: not started again"
        exit 2
        ;;
    75) go_on_later ;;
    *)
        # SIGTERM that comes before the ranks have begun to listen ends them: there was nothing to save.
        [ "$code" != 143 ] || [ -z "$stopping" ] || go_on_later
        explain
        try_again "$code" "a rank failed, code $code"
        ;;
esac


# From here on the script is the same for every sweep: `workdir`, `srun` and `command` are set.

checkpoints() {
  find "$workdir/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' ! -name '*tmp*' 2>/dev/null | sort
}

fail() {  # fail CODE MESSAGE: the message is what the sweep's table and the report show
  echo "$2" >"$workdir/error.txt"
  exit "$1"
}

if [ -e "$workdir/result.json" ]; then
  echo "$workdir finished before"
  exit 0
fi
mkdir -p "$workdir" || exit 1
rm -f "$workdir/error.txt"
before=$(checkpoints)

# Ahead of the time limit (--signal) only the run is told to stop, and what becomes of it is decided
# below. Where SLURM itself ends the job, by scancel or a requeue, it tells this shell too: then
# that is decided already.
ended=
trap 'ended=yes' TERM

# The signal that ends the job goes to all its processes: what writes the log is the last to go.
srun "${srun[@]}" "${command[@]}" >>"$workdir/log.txt" \
  2> >(trap '' TERM INT; exec tee -a "$workdir/log.txt" >"$workdir/.stderr")
code=$?
wait
said=$(grep -v -e '^srun: ' -e '^slurmstepd' -e '^[[:space:]]*$' "$workdir/.stderr")
rm -f "$workdir/.stderr"

if [ "$code" -eq 0 ] || [ "$ended" ]; then
  exit "$code"
fi
if [ "$code" -eq 143 ] || [ "$code" -eq 130 ]; then  # stopped by a signal: it goes on later
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$(checkpoints)" = "$before" ]; then
    # It would come back to the same place for ever.
    fail 1 "stopped twice without a new checkpoint; it needs a longer --time."
  fi
  scontrol requeue "$SLURM_JOB_ID" || fail 1 "stopped, and could not be requeued."
  exit "$code"
fi
# The last line that says what went wrong, ours or the end of a traceback; jax and C++ libraries may
# add theirs.
message=$(grep -E '^(error:|[A-Za-z0-9_.]*(Error|Exception|Interrupt)\b)' <<<"$said" | tail -n 1)
message=${message:-$(tail -n 1 <<<"$said")}
message=${message#error: }
fail "$code" "${message:-ended with code $code}"

#!/bin/bash
# Epilog of slurm.conf: ranks of this job that are still on the node when it is over leave cleanly. Those are ranks that
# SLURM does not know as its own (ssh, a container engine, a `ray start` that has left its step).
# It runs as the job's user, who alone sees them; a job of somebody else on the same node is not touched.
# No TaskEpilog: that runs when the first task of a node ends, and would stop the others in their last save.

# The program on every node. SLURM gives an epilog no PATH: a full path, please.
autoteardown=/usr/local/bin/autoteardown

log() { logger --tag slurm-epilog "job $SLURM_JOB_ID: $1"; }

export PATH=/usr/sbin:/usr/bin:/sbin:/bin
if [ ! -x "$autoteardown" ]; then
    log "no $autoteardown on this node: ranks that have outlived the job are left alone"
    exit 0
fi
drain=("$autoteardown" drain --job "$SLURM_JOB_ID" --timeout 25)
if [ "$(id -u)" -eq 0 ] && [ -n "${SLURM_JOB_USER:-}" ]; then
    drain=(runuser -u "$SLURM_JOB_USER" -- "${drain[@]}")
fi
said=$("${drain[@]}" 2>&1)
code=$?
[ "$code" -eq 0 ] || log "drain ended with $code: ${said:(-400)}"
exit 0 # a node whose epilog fails takes no more jobs

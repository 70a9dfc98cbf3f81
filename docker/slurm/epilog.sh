#!/bin/bash
# Epilog of slurm.conf: whatever ranks of this job are still on the node when it is over leave cleanly. Those are ranks that
# SLURM does not know as its own (ssh, a container engine, a `ray start` that has left its step).
# As the job's user, who alone sees them; a job of somebody else on the same node is not touched.
# No TaskEpilog: that runs when the first task of a node ends, and would stop the others in their last save.
export PATH # SLURM sets none, and bash hands its own default on only so: write it out if autoteardown is elsewhere
command -v autoteardown > /dev/null || exit 0
drain=(autoteardown drain --job "$SLURM_JOB_ID" --timeout 25)
if [ "$(id -u)" -eq 0 ] && [ -n "${SLURM_JOB_USER:-}" ]; then
    drain=(runuser -u "$SLURM_JOB_USER" -- "${drain[@]}")
fi
"${drain[@]}"
exit 0 # a node whose epilog fails takes no more jobs

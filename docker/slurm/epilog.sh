#!/bin/bash
# TaskEpilog, or Epilog of slurm.conf: whatever ranks of this job are still on the node leave before SLURM kills them.
# As the job's user, who alone sees them; a job of somebody else on the same node is not touched.
command -v autoteardown > /dev/null || exit 0
drain=(autoteardown drain --job "$SLURM_JOB_ID" --timeout 25)
if [ "$(id -u)" -eq 0 ] && [ -n "${SLURM_JOB_USER:-}" ]; then
    exec runuser -u "$SLURM_JOB_USER" -- "${drain[@]}"
fi
exec "${drain[@]}"

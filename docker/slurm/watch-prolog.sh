#!/bin/sh
# TaskProlog of a cluster in a cloud: `autoteardown watch` for each job, once on each node, as the job's user.
# It ends with the job: SLURM ends every process of a job at its end.
[ "${SLURM_LOCALID:-0}" = 0 ] || exit 0
setsid autoteardown watch --job "$SLURM_JOB_ID" >/dev/null 2>&1 </dev/null &

"""A real SLURM of this machine alone: munge, a controller and six nodes, up in a few seconds, as root.

Everything runs in namespaces of its own (PIDs, mounts, network, host name):

1. Process 1 in there ends when the pipe that is its standard input closes, and the kernel then ends all that it has
   started: daemons, step daemons, jobs. Not even a SIGKILL of the tests leaves something behind.
2. `/etc/slurm`, `/etc/hosts` and the sockets are the cluster's own: the machine's files stay as they are, and several
   clusters can be up at a time.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from harness import PATIENCE, wait_until

PACKAGES = ("slurmd", "slurmctld", "slurm-client", "munge", "slurm-wlm-basic-plugins")
NODES = ("n1", "n2", "n3", "n4", "n5", "n6")
_TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")

# Short, and long enough for two ranks to stop within them on a busy machine. The order of SLURM's signals does not
# depend on them: every row of docs/slurm.md was also seen with SLURM's own 30 s.
KILL_WAIT = 12
GRACE_TIME = 12

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost=slurm(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
Epilog=/etc/slurm/epilog.sh
NodeName=n[1-6] NodeHostname=slurm NodeAddr=127.0.0.1 Port=[17001-17006] CPUs=64 Gres=gpu:16 State=UNKNOWN
PartitionName=DEFAULT MaxTime=60 DefaultTime=30 PriorityTier=1 PreemptMode=OFF OverSubscribe=NO
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=down Nodes=n[5-6]
PartitionName=requeue_grace Nodes=n[3-4] GraceTime={grace_time} PreemptMode=REQUEUE
PartitionName=requeue Nodes=n[3-4] GraceTime=0 PreemptMode=REQUEUE
PartitionName=cancel_grace Nodes=n[3-4] GraceTime={grace_time} PreemptMode=CANCEL
PartitionName=urgent Nodes=n[3-4] PriorityTier=10
"""

# Bash reaps what is orphaned while it waits in `read`; that ends when the tests are over, however they end.
_FIRST_PROCESS = r"""
set -eu
folder=$1
hostname slurm
ip link set lo up
ip addr add 10.77.0.1/32 dev lo # with loopback addresses alone, getaddrinfo(AI_ADDRCONFIG) knows no name
mount --make-rprivate /
mkdir -p /etc/slurm
mount --bind "$folder/etc" /etc/slurm
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/resolv.conf" /etc/resolv.conf
if [ -d /sys/fs/cgroup/freezer ]; then
    mkdir -p "/sys/fs/cgroup/freezer/$(basename "$folder")"
    mount --bind "/sys/fs/cgroup/freezer/$(basename "$folder")" /sys/fs/cgroup/freezer
fi
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/run/munge.seed"
slurmctld -c
for node in n1 n2 n3 n4 n5 n6; do slurmd -N $node; done
echo up
set +e
read -r _
exit 0
"""


@functools.cache
def why_not():
    """Why there can be no SLURM here; None if there can be one."""
    if os.geteuid():
        return "a SLURM of the tests' own needs root"
    missing = [
        tool for tool in _TOOLS if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    ]
    if missing:
        return f"needs {', '.join(missing)} (`make slurm` installs {' '.join(PACKAGES)} where apt is)"
    probe = subprocess.run(
        ["unshare", "--pid", "--mount", "--net", "--uts", "--fork", "--mount-proc", "true"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """One of them. `proctrack`: cgroup, linuxproc or pgid."""

    def __init__(self, proctrack="linuxproc", kill_wait=KILL_WAIT, grace_time=GRACE_TIME, more=""):
        self.proctrack, self.kill_wait, self.grace_time = proctrack, kill_wait, grace_time
        # Not in the folder of the tests: nobody but its owner may go in there.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        for name in ("etc", "state", "log", "run", "dev", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost slurm {' '.join(NODES)}\n10.77.0.1 slurm\n")
        (self.folder / "resolv.conf").write_text("")  # no name server can be reached: ask none
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(16):
            os.mknod(
                self.folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3)
            )  # /dev/null, sixteen times
        self.write("slurm.conf", _CONFIGURATION.format(**vars(self)) + more)
        self.write("gres.conf", f"NodeName=n[1-6] Name=gpu File={self.folder}/dev/gpu[0-15]\n")
        self.write("cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        self.write("epilog.sh", "#!/bin/sh\nexit 0\n", 0o755)
        command = ["unshare", "--pid", "--mount", "--net", "--uts", "--fork", "--mount-proc"]
        with (self.folder / "log" / "first").open("wb") as log:
            self._unshare = subprocess.Popen(
                [*command, "bash", "-c", _FIRST_PROCESS, "slurm", str(self.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            )  # fmt: skip
        try:
            wait_until(lambda: self._says("first", "up\n") or self._unshare.poll() is not None, "the daemons")
            assert self._unshare.poll() is None, self.logs()
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
            (self._first,) = children.read_text().split()
            wait_until(
                lambda: set(self.command("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"}, "nodes", 60
            )
        except BaseException:
            print(self.logs())
            self.down()
            raise

    def _says(self, log, text):
        return text in (self.folder / "log" / log).read_text(errors="replace")

    def write(self, name, text, mode=0o644):
        """A file of /etc/slurm."""
        path = self.folder / "etc" / name
        path.write_text(text)
        path.chmod(mode)

    def logs(self):
        """The end of everything that the daemons have logged."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-600:]}"
            for path in sorted((self.folder / "log").iterdir())
        )

    def command(self, *words, check=True, env=None, cwd=None):
        """What a command in the cluster prints."""
        words = ["nsenter", "-t", self._first, "-p", "-m", "-n", "-u", f"--wd={cwd or '/'}", *map(str, words)]
        run = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=env)
        assert not check or run.returncode == 0, f"{words}: {run.stdout}{run.stderr}"
        return run.stdout

    def submit(self, script, *options, env=None, args=(), name="job"):
        """Hand a batch script in; give its job."""
        path = self.folder / f"{name}.sbatch"
        path.write_text(script)
        output = self.folder / f"{name}.out"
        output.touch()
        options = ("--open-mode=append", f"--output={output}", *options)
        env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.folder), **(env or {})}
        said = self.command("sbatch", "--parsable", *options, path, *args, env=env, cwd=self.folder)
        return Batch(self, said.split(";")[0].strip(), output)

    def down(self):
        """End it, and all that runs in it."""
        self._unshare.stdin.close()
        self._unshare.wait(PATIENCE)
        freezer = Path("/sys/fs/cgroup/freezer") / self.folder.name
        # A cgroup is empty a moment after its last process has ended, and its folders go from the innermost on.
        for _ in range(100):
            for path in (*sorted(freezer.rglob("*/"), reverse=True), freezer):
                with contextlib.suppress(OSError):
                    path.rmdir()
            if not freezer.exists():
                break
            time.sleep(0.1)
        shutil.rmtree(self.folder)


class Batch:
    """A job of a cluster."""

    def __init__(self, cluster, number, output):
        self.cluster, self.number, self._output = cluster, number, output

    @property
    def output(self):
        return self._output.read_text(errors="replace")

    def show(self, field):
        """What `scontrol show job` says under a name: JobState, Restarts, ExitCode, ..."""
        text = self.cluster.command("scontrol", "show", "job", self.number)
        return re.search(rf"(?:^|\s){field}=(\S*)", text)[1]

    @property
    def state(self):
        return self.show("JobState")

    def wait_for(self, text, times=1, patience=PATIENCE):
        """Wait until a line of its output matches."""
        pattern = re.compile(text, re.M)
        wait_until(lambda: len(pattern.findall(self.output)) >= times, f"{text!r}", patience)

    def wait_for_state(self, *states, patience=PATIENCE):
        """Wait until it is in one of these states; give it."""
        return wait_until(
            lambda: self.state in states and self.state, f"{states}, not {self.state}", patience
        )

    def pid_of_rank(self, rank):
        """In the cluster."""
        return re.findall(rf"^rank {rank} pid (\d+) step", self.output, re.M)[-1]

    def transcript(self):
        """Everything known, for a failure message."""
        return f"{self.state} {self.show('ExitCode')}\n{self.output[-6000:]}"

    def __str__(self):
        return self.number

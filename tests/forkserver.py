"""A process that imports torch once, and forks a process with a fresh `__main__` for each rank of a test.

Importing torch takes seconds and forking takes milliseconds: with this, an eviction test lasts as long as its
eviction. What runs in the child is the real thing: its own session, its own stdout and stderr, the program
executed as `__main__` at the top level of the interpreter, and the interpreter's own way out at the end.

Protocol on the socket whose number is in argv: a line of JSON in (`argv`, `env`, `cwd`, `stdout`, `stderr`,
`handwritten`, `network`: a network namespace or null), `{"pid": n}` out; and `{"pid": n, "code": c}` when that child
has been reaped.
"""

import gc
import json
import os
import select
import socket
import sys
from pathlib import Path


def preload():
    """Import what the programs use. Nothing here may start a thread: a fork would lose it."""
    import asyncio  # noqa: F401  the same goes for what the tests of handlers use

    import torch
    import torch._dynamo  # what the first optimizer step would import
    import torch.distributed as dist
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.utils.data

    dist.is_available()
    torch.set_num_threads(1)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"a fork server must have one thread, not {len(threads)}")
    # Moved out of the collector's sight, so that the children's last collections do not copy every page.
    gc.collect()
    gc.freeze()


def enter(namespace):
    """Have the network of that namespace from here on."""
    import ctypes

    fd = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), namespace)
    os.close(fd)


def become(request):
    """Turn the forked child into the process that was asked for; return the code that it is to run."""
    os.setsid()
    if request["network"]:
        enter(request["network"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, path in (1, request["stdout"]), (2, request["stderr"]):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(request["cwd"])
    for name in [name for name in os.environ if name.startswith("AUTOTEARDOWN_")]:
        del os.environ[name]
    os.environ.update(request["env"])
    sys.argv[:] = request["argv"]
    sys.path[0] = str(Path(__file__).parent / "programs")
    if request["handwritten"]:
        import handwritten

        handwritten.install()
    code = compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec")
    main = vars(sys.modules["__main__"])
    main["__file__"] = sys.argv[0]
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    return code


def serve(channel):
    """Fork on demand and reap, for ever; return in a child, with its request."""
    lines = channel.makefile("r")
    children = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != channel.fileno():
                poll.unregister(fd)
                os.close(fd)
                pid, status = os.waitpid(children.pop(fd), 0)
                answer = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
            else:
                line = lines.readline()
                if not line:
                    sys.exit(0)
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    for fd in children:
                        os.close(fd)
                    return request
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid
                poll.register(pidfd, select.POLLIN)
                answer = {"pid": pid}
            channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    preload()
    exec(become(serve(socket.socket(fileno=int(sys.argv[1])))))

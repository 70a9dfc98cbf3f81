"""One rank that has nothing but a channel. Commands come on stdin, lines of JSON; what happens goes to stdout.

    talk.py STORE RANK WORLD

STORE is tcp:HOST:PORT, serve:HOST:PORT (and be the server), file:PATH, hash, py:FOLDER or none. The coordinator says
everything that it hears of to everybody.
"""

import json
import os
import sys
import threading
import time

from autoteardown import native_calls
from autoteardown.channel import channel as channels
from autoteardown.event_loop.loop import Loop


class Coordinator:
    """Passes everything on."""

    def __init__(self):
        self.wake = float("inf")

    def on(self, rank, kind, value, now):
        if kind == "alarm":
            self.wake = now + value
            return []
        if kind == "tick":
            self.wake = float("inf")
            return [(None, "rang", None)]
        if kind == "whisper":
            return [(value["to"], "whisper", [rank, value["text"]])]
        if kind == "boom":
            raise RuntimeError("boom")
        return [(None, kind, [rank, value])]


class FolderStore:
    """As much of a store as the channel needs, without a torch to wait for."""

    def __init__(self, folder):
        self._folder = folder

    def _path(self, key):
        return os.path.join(self._folder, key.replace("/", "-"))

    def set(self, key, value):
        if value and os.path.exists(os.path.join(self._folder, "read-only")):
            raise RuntimeError("read-only")
        with open(self._path(key) + str(os.getpid()), "w") as file:
            file.write(value)
        os.rename(file.name, self._path(key))

    def check(self, keys):
        return all(os.path.exists(self._path(key)) for key in keys)

    def get(self, key):
        with open(self._path(key), "rb") as file:
            return file.read()


_lock = threading.Lock()


def say(*line):
    with _lock:
        os.write(1, json.dumps([round(time.monotonic(), 4), *line]).encode() + b"\n")


def open_store(where):
    kind, _, rest = where.partition(":")
    if kind == "none":
        return None
    if kind == "py":
        return FolderStore(rest)
    import torch.distributed as dist

    if kind == "file":
        return dist.FileStore(rest, -1)
    if kind == "hash":
        return dist.HashStore()
    host, _, port = rest.rpartition(":")
    return dist.TCPStore(host.strip("[]"), int(port), is_master=kind == "serve", wait_for_workers=False)


def descriptors():
    return len(os.listdir("/proc/self/fd")) - 1


def threads():
    return len(os.listdir("/proc/self/task"))


def main():
    where, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = open_store(where)
    if store is not None and not where.startswith("py:"):
        import torch.distributed as dist

        store = dist.PrefixStore("default_pg", store)
    loop = Loop(lambda data: say("signal", list(data)), lambda error: say("deaf", str(error)), lambda: None)
    channel, names = None, {}

    def deliver(kind, value):
        say("heard", kind, value)

    say("ready", os.getpid())
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "open":
            start = time.perf_counter()
            channel = channels.Channel.open(store, rank, world, loop, deliver, Coordinator)
            say("opened", round((time.perf_counter() - start) * 1e3, 3))
        elif what == "post":
            channel.post(*rest)
        elif what == "flush":
            say("flushed", channel.flush(rest[0]))
        elif what == "close":
            channel.close()
            say("closed")
        elif what == "state":
            say("state", channel.connected, channel.why, channel.is_hub)
        elif what == "count":
            say("count", descriptors(), threads())
        elif what == "fork":
            pid = os.fork()
            if pid == 0:
                try:
                    channel.forget()
                    loop.forget()
                    say("child", descriptors(), channel.connected)
                    time.sleep(rest[0])
                finally:
                    os._exit(0)
        elif what == "closerange":
            os.closerange(3, 1 << 12)
            say("closed range")
        elif what == "do":
            names.update(channel=channel, loop=loop, say=say, store=store)
            exec(rest[0], names)
            say("done")
        elif what == "end":
            channels.close_all()
            native_calls.wait_for_running(2)
            return
        elif what == "exit":
            os._exit(0)


if __name__ == "__main__":
    main()

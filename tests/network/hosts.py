"""Hosts as network namespaces on a switch (a bridge in one more), with cables to pull. Root only."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(*command, check=True):
    found = subprocess.run(command, capture_output=True, text=True)
    if check and found.returncode:
        raise AssertionError(f"{' '.join(command)}: {found.stderr.strip() or found.stdout.strip()}")
    return found.stdout


def missing(*tools):
    """Why network tests cannot run here; None if they can."""
    if os.geteuid():
        return "network namespaces need root"
    for tool in ("ip", *tools):
        if not shutil.which(tool):
            return f"needs {tool}"
    name = f"at-probe-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "-n", name, "link", "add", "probe", "type", "bridge")
        finally:
            run("ip", "netns", "del", name, check=False)
    except AssertionError as error:
        return f"no network namespaces here: {error}"
    return None


def needs(*tools):
    why = missing(*tools)
    return pytest.mark.skipif(why is not None, reason=why or "")


_INPUT, _OUTPUT = (f"type filter hook {hook} priority 0;" for hook in ("input", "output"))


class Host:
    """One of them."""

    def __init__(self, net, number, v4, v6):
        self.net, self.number = net, number
        self.name = f"{net.name}-h{number}"
        self.prefix = ("ip", "netns", "exec", self.name)
        self.ip4, self.ip6 = f"10.77.0.{number}", f"fd77::{number}"
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        self.plug("eth0", net.switch, [f"{self.ip4}/24"] * v4 + [f"{self.ip6}/64"] * v6)

    def plug(self, interface, switch, addresses):
        """One more interface, on that switch."""
        port = f"p{self.number}{interface}"
        run("ip", "link", "add", interface, "netns", self.name, "type", "veth", "peer", port, "netns", switch)
        run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        for address in addresses:
            self.ip("addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        self.ip("link", "set", interface, "up")

    def file(self, name, text):
        """What programs that are started with `prefix` find as /etc/NAME."""
        folder = Path("/etc/netns") / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def ip(self, *command):
        return run("ip", "-n", self.name, *command)

    def run(self, *command):
        return run(*self.prefix, *command)

    def nft(self, *lines):
        """Replace the rules of the host."""
        text = "flush ruleset\ntable inet t {\n" + "\n".join(lines) + "\n}\n"
        subprocess.run([*self.prefix, "nft", "-f", "-"], input=text, text=True, check=True)

    def pull(self):
        """Its cable."""
        run("ip", "-n", self.net.switch, "link", "set", f"p{self.number}eth0", "down")

    def plug_in(self):
        run("ip", "-n", self.net.switch, "link", "set", f"p{self.number}eth0", "up")

    def lines(self, pid=None):
        """Local and remote ends of the lines to a hub that rank `pid` keeps, or all of this host.

        Of the connections of a job they are the ones with keep-alive.
        """
        found = []
        for line in self.run("ss", "-Htnpo", "state", "established").splitlines():
            if "timer:(keepalive" in line and (pid is None or f"pid={pid}," in line):
                local, remote = line.split()[2:4]
                found.append((local, remote))
        return found

    def reset(self, *lines):
        """End connections, given as local and remote ends, as whatever lies between may do."""
        for local, remote in lines:
            self.run("ss", "-K", "-tn", "src", local, "dst", remote)

    def forget(self, *lines):
        """Swallow the packets of connections, both ways, as an address translator that has forgotten them."""
        rules = []
        for number, (local, remote) in enumerate(lines):
            (_, here), (_, there) = split(local), split(remote)
            rules += [
                f"chain i{number} {{ {_INPUT} tcp dport {here} tcp sport {there} drop; }}",
                f"chain o{number} {{ {_OUTPUT} tcp sport {here} tcp dport {there} drop; }}",
            ]
        self.nft(*rules)

    def lose(self, percent):
        """So many of the packets that come to this host and go from it, but for its own."""
        some = f"numgen random mod 100 < {percent} drop"
        self.nft(
            f"chain i {{ {_INPUT} iifname != lo {some}; }}", f"chain o {{ {_OUTPUT} oifname != lo {some}; }}"
        )

    def close_port(self, port, verdict="drop", new=False):
        """A policy for what other hosts send to that port: `drop`, or `reject with tcp reset`.

        `new`: only for what opens a connection.
        """
        opens = "tcp flags & (syn | ack) == syn" if new else ""
        self.nft(f"chain i {{ {_INPUT} iifname != lo tcp dport {port} {opens} {verdict}; }}")


def split(end):
    """Address and port of one end of a connection, as `ss` writes it."""
    host, _, port = end.rpartition(":")
    return host.strip("[]"), int(port)


class Net:
    """A switch and its hosts."""

    _count = itertools.count()

    def __init__(self):
        self.name = f"at{os.getpid()}n{next(self._count)}"
        self.switch = f"{self.name}-s"
        self.names = [self.switch]
        self.helpers = []
        self.add_switch(self.switch)

    def add_switch(self, name):
        run("ip", "netns", "add", name)
        if name not in self.names:
            self.names.append(name)
        run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", name, "link", "set", "br0", "up")

    def host(self, number, v4=True, v6=False):
        self.names.append(f"{self.name}-h{number}")
        return Host(self, number, v4, v6)

    def proxy(self, host, port, mark, idle):
        """A proxy on that host; see programs/proxy.py."""
        program = Path(__file__).parent.parent / "programs" / "proxy.py"
        command = [*host.prefix, sys.executable, str(program), str(port), str(mark), str(idle)]
        self.helpers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert self.helpers[-1].stdout.readline() == b"ready\n"

    def close(self):
        for helper in self.helpers:
            helper.kill()
            helper.wait()
            if helper.stdout is not None:
                helper.stdout.close()
        for name in self.names:
            run("ip", "netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def slow_line(net, one, other, seconds, loss):
    """A line between two hosts that takes so long each way and loses that part of the packets; their addresses."""
    net.helpers.append(
        subprocess.Popen([sys.executable, __file__, one.name, other.name, str(seconds), str(loss)])
    )
    for host, address in ((one, "10.88.0.1"), (other, "10.88.0.2")):
        end = time.monotonic() + 20
        while "slow0" not in run("ip", "-n", host.name, "link"):
            assert time.monotonic() < end
            time.sleep(0.02)
        host.ip("addr", "add", f"{address}/24", "dev", "slow0")
        host.ip("link", "set", "slow0", "up")
    return "10.88.0.1", "10.88.0.2"


def _carry(one, other, delay, loss):
    """Carry packets between two TUN devices."""
    import fcntl
    import heapq
    import random
    import select
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    tuns = []
    for name in (one, other):
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        assert libc.setns(fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH14x", b"slow0", 0x1001))  # TUNSETIFF: TUN, no header
        tuns.append(tun)
    waiting, count = [], 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, tun, packet = heapq.heappop(waiting)
            try:
                os.write(tun, packet)
            except OSError:
                pass
        ready, _, _ = select.select(tuns, [], [], max(0, waiting[0][0] - now) if waiting else None)
        for tun in ready:
            try:
                packet = os.read(tun, 65536)
            except OSError:
                continue
            if random.random() >= loss:
                count += 1
                sink = tuns[1 - tuns.index(tun)]
                heapq.heappush(waiting, (time.monotonic() + delay, count, sink, packet))


if __name__ == "__main__":
    _carry(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

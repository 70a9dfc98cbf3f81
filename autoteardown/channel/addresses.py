"""Lists this host's own IP addresses for the hub to listen on and to publish, best first.

1. Interfaces that the user has chosen come first (`GLOO_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME`).
2. Then addresses that are known to work: the local ends of this process's connections to the store. Over these the
   peers have reached this host, or this host has reached the store's server.
3. Then the rest in NCCL's order: container bridges after everything else, loopback last.
4. No name is ever resolved.
"""

from __future__ import annotations

import _socket
import array
import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

from autoteardown import unpatched

MAX_ADDRESSES = 4
"""Addresses used besides loopback; each needs a listening socket."""

_SIOCGIFCONF, _SIOCGIFFLAGS = 0x8912, 0x8913
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_IFREQ = 40
_UNUSABLE = 0x08 | 0x40 | 0x20  # IFA_F_DADFAILED, IFA_F_TENTATIVE, IFA_F_DEPRECATED
_LINK_LOCAL = 0x20
_CONTAINER_BRIDGES = ("docker", "virbr", "br-", "veth", "cni", "podman", "lxc", "cilium", "kube-")


class Interface(NamedTuple):
    """One address of one interface that is up."""

    name: str
    host: str
    loopback: bool


def ordered(
    interfaces: Iterable[Interface], environ: Mapping[str, str], used: Iterable[str], one_host: bool
) -> list[str]:
    """The addresses to listen on and to publish, best first.

    Args:
        interfaces: this host's addresses.
        environ: holds the names of the interfaces that the user has chosen.
        used: local addresses of the store's connections, the most used first.
        one_host: every rank runs on this host.
    """
    found = list(dict.fromkeys(interfaces))
    wanted = [each for each in found if _wanted(each.name, environ)]
    loopback = [each.host for each in (wanted or found) if each.loopback]
    if one_host and any(each.loopback for each in found):
        return [each.host for each in found if each.loopback][:1]
    usable = [each for each in (wanted or found) if not each.loopback]
    used = [plain(host) for host in used]

    def order(each: Interface) -> tuple[int, bool]:
        place = used.index(each.host) if each.host in used else len(used)
        return place, each.name.startswith(_CONTAINER_BRIDGES)

    return [each.host for each in sorted(usable, key=order)][:MAX_ADDRESSES] + loopback[:1]


def _wanted(name: str, environ: Mapping[str, str]) -> bool:
    gloo = environ.get("GLOO_SOCKET_IFNAME", "")
    if name in [each.strip() for each in gloo.split(",")]:
        return True
    # NCCL's syntax: "eth,ib" lists prefixes, "=eth0" full names, "^docker" what to exclude.
    nccl = environ.get("NCCL_SOCKET_IFNAME", "").strip()
    if not nccl or gloo:
        return False
    exclude, exact = nccl.startswith("^"), nccl.lstrip("^").startswith("=")
    names = [each.partition(":")[0] for each in nccl.lstrip("^=").split(",") if each]
    matches = name in names if exact else name.startswith(tuple(names))
    return matches != exclude


def plain(host: str) -> str:
    """The address without an IPv6 scope, and an IPv4-mapped IPv6 address as IPv4."""
    host = host.partition("%")[0]
    return host[7:] if host.lower().startswith("::ffff:") and "." in host else host


def interfaces() -> list[Interface]:
    """Every usable address of this network namespace; empty where the system does not list them."""
    found: list[Interface] = []
    for source in (_ipv4, _ipv6):
        try:
            found += source()
        except (OSError, ValueError, ImportError):
            continue
    return found


def _ipv4() -> list[Interface]:
    import fcntl

    sock = unpatched.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        table = array.array("B", bytes(_IFREQ * 256))
        request = struct.pack("iP", len(table), table.buffer_info()[0])
        length = struct.unpack("iP", fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, request))[0]
        data = table.tobytes()[:length]
        found = []
        for at in range(0, length, _IFREQ):
            label = data[at : at + 16].partition(b"\0")[0]
            host = _socket.inet_ntop(_socket.AF_INET, data[at + 20 : at + 24])
            asked = fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, struct.pack("16s24x", label))
            flags = struct.unpack_from("H", asked, 16)[0]
            if flags & _IFF_UP:
                name = label.partition(b":")[0].decode(errors="replace")
                found.append(Interface(name, host, bool(flags & _IFF_LOOPBACK)))
        return found
    finally:
        sock.close()


def _ipv6() -> list[Interface]:
    found = []
    with open("/proc/net/if_inet6") as table:
        for line in table:
            digits, _, _, scope, flags, name = line.split()
            if int(scope, 16) == _LINK_LOCAL or int(flags, 16) & _UNUSABLE:
                continue
            host = _socket.inet_ntop(_socket.AF_INET6, bytes.fromhex(digits))
            found.append(Interface(name, host, host == "::1"))
    return found


def connections(port: int, most: int = 64) -> list[tuple[Any, bool]]:
    """This process's TCP connections to or from a store at that port.

    Returns:
        A duplicate of each socket, which the caller has to close, and whether it is the client's end. Empty where the
        connections cannot be listed.
    """
    found: list[tuple[Any, bool]] = []
    # With a default time-out, making a socket object from a descriptor makes the connection itself non-blocking.
    if _socket.getdefaulttimeout() is not None:
        return []
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return []
    for name in names:
        if len(found) == most:
            break
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            sock = unpatched.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            if sock.family in (_socket.AF_INET, _socket.AF_INET6):
                peer = sock.getpeername()[1]
                if port in (peer, sock.getsockname()[1]):
                    found.append((sock, peer == port))
                    continue
        except OSError:
            pass
        sock.close()
    return found


def used_by_store(port: Optional[int]) -> list[str]:
    """The local addresses of the connections to the store at that port, the most used first."""
    if not port:
        return []
    hosts: Counter[str] = Counter()
    for sock, _ in connections(port):
        hosts[plain(sock.getsockname()[0])] += 1
        sock.close()
    return [host for host, _ in hosts.most_common()]


def host_id() -> str:
    """A hash of the kernel's boot and the network namespace, equal for processes that share a loopback interface.

    Empty where the system does not tell.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            where = boot.read() + os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
    return hashlib.sha256(where.encode()).hexdigest()[:16]

"""Writes stops as a trace for ui.perfetto.dev, in the Chrome trace event format that PyTorch's profiler writes, too.

1. A process of the trace is a host, a thread is a rank, a slice is a phase.
2. All stops start at time 0, their own first signal. The attempts of a job are hours apart, and a reader wants to
   compare them.
"""

from __future__ import annotations

import json
from typing import Any

from autoteardown.timeline.stops import DEFAULT_GRACE, Rank, Stop, ending

Event = dict[str, Any]


def trace(stops: list[Stop], grace: float | None) -> str:
    """The trace as JSON text."""
    events: list[Event] = []
    processes: dict[str, int] = {}
    threads = 0
    for number, stop in enumerate(stops, 1):
        where: dict[int, tuple[int, int]] = {}
        for rank in stop.ranks:
            host = f"{rank.host} (stop {number})" if len(stops) > 1 else rank.host
            if host not in processes:
                # Different from all thread ids: perfetto takes a thread with its process's id for the main thread.
                processes[host] = 1_000_000 + len(processes)
                events.append(_name("process", processes[host], 0, host))
                events.append(_sort("process", processes[host], 0, len(processes)))
            threads += 1
            where[id(rank)] = (processes[host], threads)
            events.append(_name("thread", *where[id(rank)], f"{rank.name} (pid {rank.pid})"))
            events.append(_sort("thread", *where[id(rank)], threads))
            events += _slices(stop, rank, *where[id(rank)])
        events += _flows(stop, where)
        events.append(_grace(grace or stop.grace or DEFAULT_GRACE, *next(iter(where.values()))))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")) + "\n"


def _slices(stop: Stop, rank: Rank, pid: int, tid: int) -> list[Event]:
    """The slices of a rank's whole stop and of its phases, and the instant of its signal or notice."""
    begin = _us(stop.offset(rank))
    # At least 1 us: a flow cannot bind to a slice of length 0.
    finish = max(begin + 1, _us(stop.offset(rank) + rank.lasted))
    common = {"ph": "X", "cat": "teardown", "pid": pid, "tid": tid}
    whole = {
        "rank": rank.rank,
        "host": rank.host,
        "pid": rank.pid,
        "cause": rank.cause,
        "exit_code": rank.exit_code,
        "step_at_signal": rank.at_signal,
        "stopped_at": rank.stopped_at,
        "stuck": rank.stuck,
    }
    events: list[Event] = [
        {
            **common,
            "name": ending(rank),
            "ts": begin,
            "dur": finish - begin,
            "args": whole,
        },
        {
            "ph": "i",
            "s": "t",
            "cat": "teardown",
            "name": rank.signal or "signal" if rank.cause == "signal" else "notice of a peer",
            "pid": pid,
            "tid": tid,
            "ts": begin,
        },
    ]
    free = begin
    for phase in rank.phases:
        # Slices of a thread must nest, and rounding can make neighbours overlap. The args have the exact times.
        start = min(max(free, _us(stop.offset(rank) + phase.start)), finish)
        end = finish if phase.end is None else min(max(start, _us(stop.offset(rank) + phase.end)), finish)
        free = end
        args = {"outcome": phase.outcome, "detail": phase.detail, "start": phase.start, "end": phase.end}
        name = phase.name if phase.outcome == "ok" else f"{phase.name} ({phase.outcome})"
        events.append({**common, "name": name, "ts": start, "dur": end - start, "args": args})
    return events


def _flows(stop: Stop, where: dict[int, tuple[int, int]]) -> list[Event]:
    """An arrow from the rank that was signalled first to each of its peers."""
    source = next((r for r in stop.ranks if r.is_origin), None)
    if source is None:
        return []
    events: list[Event] = []
    for rank in stop.ranks:
        if rank.cause != "peer":
            continue
        begin = _us(stop.offset(source))
        # The clocks of hosts differ. An arrow that would go back in time is drawn vertically.
        received = max(begin, _us(stop.offset(rank)))
        if received > max(_us(stop.offset(rank)) + 1, _us(stop.offset(rank) + rank.lasted)):
            continue
        pid, tid = where[id(rank)]
        flow = {"cat": "notice", "name": "notice", "id": tid}
        events.append(
            {**flow, "ph": "s", "pid": where[id(source)][0], "tid": where[id(source)][1], "ts": begin}
        )
        events.append({**flow, "ph": "f", "bp": "e", "pid": pid, "tid": tid, "ts": received})
    return events


def _grace(grace: float, pid: int, tid: int) -> Event:
    name = f"grace period ends ({grace:g} s)"
    return {"ph": "i", "s": "g", "cat": "teardown", "name": name, "pid": pid, "tid": tid, "ts": _us(grace)}


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _sort(kind: str, pid: int, tid: int, index: int) -> Event:
    return {"ph": "M", "name": f"{kind}_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": index}}


def _us(value: float) -> int:
    return round(value * 1e6)

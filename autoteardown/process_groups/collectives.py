"""Reads how far the process groups' collectives are, and which one does not end.

1. The *sequence number* of a group counts what this rank has launched (a plain read, 0.4 us).
2. The *flight recorder* of a backend keeps, for each group, the numbers of the last collective that was launched and
   of the last that has ended (15 us; NCCL's watchdog updates them ten times a second), and an entry for each
   collective.
3. The recorder's counters are numbers in memory, and safe to read whatever is stuck. Its entries are not, where a
   device is in use: to read them asks the driver about events, which has been seen to hang
   (`finishedGPUExecutionInternal` in torch's ProcessGroupNCCL says so), with the GIL held. So entries are read last,
   when nothing is lost if the process gets no further.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Collection, Hashable
from typing import Any, Callable, Optional

from autoteardown import thread_stacks
from autoteardown.node import safe_folder
from autoteardown.process_groups import custom_groups, devices


def comparable_numbers() -> dict[str, int]:
    """The sequence numbers of the groups whose names mean the same on every rank of the default group."""
    return sequence_numbers(comparable=True)


def sequence_numbers(comparable: bool = False) -> dict[str, int]:
    """The number of the last collective that this rank has launched, by the name of its group. Safe on any thread.

    A group with several backends has an entry `name/device` for each. NCCL counts every launch of a collective (a
    barrier, too; a coalesced batch once), and no send or receive. gloo counts every operation of either kind. So
    different numbers are a hint, not a proof, where gloo ranks send to single peers. Groups whose backend does not
    count (MPI, UCC, most others) are left out.
    """
    found = {}
    for name, count in launch_counters(comparable).items():
        try:
            found[name] = count()
        except Exception:  # the program has destroyed the group
            continue
    return found


def launch_counters(comparable: bool = False) -> dict[str, Callable[[], int]]:
    """Functions that return the numbers of `sequence_numbers`; each costs 0.2 us, and may raise after a destroy."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    found: dict[str, Callable[[], int]] = {}
    for group, name in list(dict(c10d._world.pg_names).items()):
        if comparable and custom_groups.known(group):
            continue
        parts = str(c10d._world.pg_backend_config.get(group, "")).split(",")
        kinds = {kind: backend for kind, colon, backend in (part.partition(":") for part in parts) if colon}
        # The group's own method raises for backends that torch does not know, and that is slow.
        counters = (
            (kind, count) for kind in kinds if (count := devices.launch_counter(group, kind)) is not None
        )
        if len(set(kinds.values())) > 1:
            found.update({f"{name}/{kind}": count for kind, count in counters})
        elif kinds:
            for _, count in counters:
                found[str(name)] = count
                break  # one backend for all devices
        else:  # configured by the backend's name alone
            try:
                group._get_sequence_number_for_group()
            except Exception:
                continue
            found[str(name)] = group._get_sequence_number_for_group
    return found


def progress(without: Collection[str] = ()) -> Optional[Hashable]:
    """A value that changes whenever this rank's collectives have advanced, on the host or on the device.

    Args:
        without: the names of groups, as in `sequence_numbers`, that do not count.

    Never blocks for long, whatever is stuck; 0.1 ms for seven groups. None: unknown, because there is no flight
    recorder, it is off (TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE is 0), or its counters stand still
    (`_frozen`). NCCL's numbers are up to 0.1 s old.
    """
    if _frozen():
        return None
    counters = {
        name: counted
        for name, dump in _recorders()
        for counted in [_call(dump, False)]
        if _has_status(counted)
    }
    if not counters:
        return None
    numbers = tuple(item for item in sequence_numbers().items() if item[0] not in without)
    if without:
        counters.pop("gloo", None)  # it has no names of groups, and tells little more than the numbers
    return (*(_without(counted, without) for counted in counters.values()), numbers)


def _without(counted: Optional[bytes], without: Collection[str]) -> Hashable:
    """What a recorder has counted, but for these groups."""
    names = sys.modules["torch.distributed.distributed_c10d"]._world.pg_names if without else {}
    ids = {_uid(group, str(name), without) for group, name in list(names.items())} - {None}
    if not ids:
        return counted
    status = _parsed(counted).get("pg_status") or {}
    return tuple((number, *sorted(each.items())) for number, each in status.items() if number not in ids)


def _uid(group: Any, name: str, without: Collection[str]) -> Optional[str]:
    """The recorder's number of a group that does not count; None for one that does, or that is not NCCL's."""
    if name not in without and f"{name}/cuda" not in without:
        return None
    try:
        return str(group._get_backend(sys.modules["torch"].device("cuda")).uid)
    except Exception:  # no such backend, or an older torch
        return None


def _frozen() -> bool:
    """Whether NCCL's counters stand still although collectives may end: its watchdog, which counts, does not run.

    1. `destroy_process_group` ends the watchdog, then waits for the device.
    2. With TORCH_NCCL_BLOCKING_WAIT the watchdog is given no work: launched collectives are not counted either.
    """
    if not devices.accelerators():
        return False
    if thread_stacks.inside("torch/distributed/distributed_c10d.py", "destroy_process_group"):
        return True
    if not any(sequence_numbers().values()):
        return False
    status = [_parsed(_call(dump, False)).get("pg_status") for name, dump in _recorders() if name != "gloo"]
    counts = [
        int(each.get("last_enqueued_collective", 0)) for groups in status for each in (groups or {}).values()
    ]
    return bool(counts) and max(counts) < 0


def stuck_collective() -> Optional[dict[str, Any]]:
    """The first collective that this rank has launched and that has not ended. Safe whatever is stuck.

    Returns:
        `group` (its name, or None if unknown), `seq`, and `op` (None on a device: `evidence` fills it in). None if
        there is no such collective, or no flight recorder.
    """
    entries = not devices.accelerators()
    if _frozen():
        return None  # the counters name one that may have ended: `evidence` finds it
    for _, dump in _recorders():
        found = _first_entry(_call(dump, True)) if entries else None
        found = found or _first_by_number(_call(dump, False))
        if found is not None:
            return found
    return None


def evidence(path: str, stuck: Optional[dict[str, Any]] = None) -> list[str]:
    """Write the flight recorders' entries to files, for `torchfrtrace` or a reader: as JSON if torch can, else as a
    pickle.

    May hang with the GIL held: call it last, when the end of the process is certain.

    Args:
        path: of the files, without "-<backend>" and a suffix.
        stuck: what `stuck_collective` has returned, whose `op` is filled in; if it is empty, the first collective
            is filled in that the entries do not call completed.

    Returns:
        The paths that were written.

    Raises:
        OSError: a file cannot be written. An existing file of that name is left alone.
    """
    written = []
    for backend, dump in _recorders():
        data = _call(dump, True)
        entries = _parsed(data).get("entries")
        if data is None or not entries:
            continue
        if stuck is not None and not stuck:
            stuck.update(_first_entry(data) or {})
        elif stuck is not None and stuck["op"] is None:
            stuck["op"] = _op_of(entries, stuck)
        target = f"{path}-{backend}.trace"  # not `.json`, which is the suffix of reports
        _write(target, data)
        written.append(target)
    return written


def _write(path: str, data: bytes) -> None:
    where, name = os.path.split(path)
    descriptor = safe_folder.open_any(where)
    try:
        safe_folder.create(descriptor, name, data, 0o644)
    finally:
        os.close(descriptor)


Dump = Callable[..., Any]
_found: dict[str, Dump] = {}


def _recorders() -> list[tuple[str, Dump]]:
    """The flight recorders that torch or a vendor offers, those of devices first. Looked up once."""
    if not _found:
        module = sys.modules.get("torch._C._distributed_c10d")
        for name in dir(module):
            if name.startswith("_dump_") and "_trace" in name:
                backend, _, kind = name[len("_dump_") :].partition("_trace")
                # "fr" is the recorder of all backends without one of their own.
                backend = "gloo" if backend == "fr" else backend
                if kind == "_json" or (not kind and backend not in _found):
                    _found[backend] = getattr(module, name)
    return sorted(_found.items(), key=lambda item: item[0] == "gloo")


def _call(dump: Dump, entries: bool) -> Optional[bytes]:
    for arguments in ({"includeStackTraces": False}, {}):  # the JSON variant takes no stack-trace argument
        try:
            data = dump(includeCollectives=entries, onlyActive=not entries, **arguments)
            return data if isinstance(data, bytes) else str(data).encode()
        except Exception:  # this recorder takes other arguments
            continue
    return None


def _parsed(data: Optional[bytes]) -> dict[str, Any]:
    try:
        if data is None:
            return {}
        found = json.loads(data) if data[:1] == b"{" else pickle.loads(data)
        return found if isinstance(found, dict) else {}
    except Exception:
        return {}


def _has_status(data: Optional[bytes]) -> bool:
    return data is not None and b"last_enqueued_collective" in data  # found in JSON and in a pickle alike


def _first_entry(data: Optional[bytes]) -> Optional[dict[str, Any]]:
    for entry in _parsed(data).get("entries") or ():
        if entry.get("state") != "completed" and not entry.get("retired"):
            return {"op": _op(entry), "seq": entry.get("collective_seq_id"), "group": _group(entry)}
    return None


def _op_of(entries: list[dict[str, Any]], stuck: dict[str, Any]) -> Optional[str]:
    for entry in entries:
        same = stuck["group"] in (None, _group(entry))
        if same and entry.get("collective_seq_id") == stuck["seq"] and not entry.get("is_p2p"):
            return _op(entry)
    return None


def _op(entry: dict[str, Any]) -> Optional[str]:
    return str(entry.get("profiling_name", "")).rpartition(":")[2] or None


def _group(entry: dict[str, Any]) -> Optional[str]:
    name = (entry.get("process_group") or [None])[0]
    return None if name is None else str(name)


def _first_by_number(data: Optional[bytes]) -> Optional[dict[str, Any]]:
    for number, status in (_parsed(data).get("pg_status") or {}).items():
        completed, launched = (
            int(status.get(f"last_{what}_collective", -1)) for what in ("completed", "enqueued")
        )
        if launched > completed:
            return {"op": None, "seq": max(completed, 0) + 1, "group": _name_of(int(number), launched)}
    return None


def _name_of(number: int, launched: int) -> Optional[str]:
    """The group's name, by its number. The recorder numbers groups in the order in which they were made, so the name is
    taken only if it is certain.
    """
    matching = [name for name, count in sequence_numbers().items() if count == launched]
    return matching[0] if len(matching) == 1 else None

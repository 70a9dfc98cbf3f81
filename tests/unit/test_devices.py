"""Devices and collectives as vendors and torch versions have them: each fake lacks what some of the real ones lack."""

import json
import os
import pickle
import sys
import threading
from types import SimpleNamespace

import pytest

from autoteardown.process_groups import collectives, devices, operations


class Group:
    """A process group: `launched` collectives on each kind of device, bound to one or not."""

    def __init__(self, launched=None, bound=None, counts=True):
        self._launched = launched or {}
        self._counts = counts
        if bound:
            self.bound_device_id = SimpleNamespace(type=bound[0], index=bound[1])

    def _get_backend(self, device):
        return SimpleNamespace(_get_sequence_number_for_group=lambda: self._launched[device])

    def _get_sequence_number_for_group(self):
        if not self._counts:
            raise RuntimeError("ProcessGroup custom does not yet support sequence numbers.")
        return next(iter(self._launched.values()))


@pytest.fixture
def torch(monkeypatch):
    """A torch of 2.4: no accelerator, nothing renamed, no flight recorder, no groups."""
    made = SimpleNamespace(_C=SimpleNamespace(), device=lambda kind: kind)
    made.c10d = SimpleNamespace(_world=SimpleNamespace(pg_names={}, pg_backend_config={}))
    made.recorders = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setitem(sys.modules, "torch.distributed.distributed_c10d", made.c10d)
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", made.recorders)
    monkeypatch.setattr(collectives, "_found", {})
    monkeypatch.setattr(devices, "_refused", {})
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def add(name, config, **options):
        group = Group(**options)
        made.c10d._world.pg_names[group] = name
        made.c10d._world.pg_backend_config[group] = config
        return group

    made.add = add
    return made


def module(waited, used=True, count=1, **more):
    """A vendor's module; what it is asked to wait for is added to `waited`."""
    return SimpleNamespace(
        is_initialized=lambda: used, device_count=lambda: count, synchronize=waited.append, **more
    )


@pytest.mark.parametrize("name", ["cuda", "xpu", "npu", "hpu", "mlu", "musa", "mtia"])
def test_modules_known_by_name(torch, name):
    waited = []
    setattr(torch, name, module(waited))
    assert (operations.accelerators(), operations.drain(), operations.unwaitable()) == ([name], None, [])
    assert waited == [None]
    setattr(torch, name, module(waited, used=False))
    assert (operations.accelerators(), operations.drain(), waited) == ([], None, [None])


def test_the_name_that_a_vendor_gave_to_privateuse1(torch):
    waited = []
    torch._C._get_privateuse1_backend_name = lambda: "neuron"
    torch.neuron = module(waited)
    assert (operations.accelerators(), operations.drain(), waited) == (["neuron"], None, [None])
    torch._C._get_privateuse1_backend_name = lambda: "privateuseone"
    assert operations.accelerators() == []


def test_what_only_torch_accelerator_can_wait_for(torch):
    waited = []
    torch.accelerator = SimpleNamespace(
        current_accelerator=lambda: SimpleNamespace(type="new"), synchronize=lambda *args: waited.append(args)
    )
    torch.new = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1)
    assert (operations.accelerators(), operations.drain(), waited) == (["new"], None, [()])
    assert operations.unwaitable() == []
    torch.accelerator.current_accelerator = lambda: 1 / 0  # 2.6 raises where there is none
    assert operations.accelerators() == []


def test_in_use_and_nothing_to_wait_with(torch):
    """A module without `is_initialized`: what a group has launched on it, or is bound to, tells."""
    torch._C._get_privateuse1_backend_name = lambda: "neuron"
    torch.neuron = SimpleNamespace()
    assert operations.unwaitable() == []
    torch.add("0", "cpu:gloo,neuron:nccom", launched={"cpu": 7, "neuron": 0})
    assert operations.unwaitable() == []  # configured for it as for all that there is
    torch.add("1", "neuron:nccom", launched={"neuron": 3})
    assert [text.partition(":")[0] for text in operations.unwaitable()] == ["neuron"]
    assert operations.drain() is None


def test_a_group_that_is_bound(torch):
    torch._C._get_privateuse1_backend_name = lambda: "neuron"
    torch.add("0", "neuron:nccom", bound=("neuron", 2))
    assert operations.accelerators() == ["neuron"]
    assert len(operations.unwaitable()) == 1


def test_xla_is_not_supported(torch):
    torch.add("0", "cpu:gloo,xla:xla")
    assert [text.partition(":")[0] for text in operations.unwaitable()] == ["xla"]


def test_a_capture_is_neither_idle_nor_wedged(torch):
    def synchronize(device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    torch.cuda = module([])
    torch.cuda.synchronize = synchronize
    assert operations.drain() is None
    assert operations.unwaitable() == ["cuda: a graph is being captured"]


def test_another_error_is_a_problem(torch):
    torch.cuda = module([])
    torch.cuda.synchronize = lambda device: 1 / 0
    assert "ZeroDivisionError" in operations.drain()
    assert operations.unwaitable() == []


@pytest.mark.parametrize(
    "has, expected",
    [
        ({}, [None]),
        ({"bound": ("xpu", 2)}, [2]),
        ({"local_rank": "3"}, [3]),
        ({"local_rank": "9"}, [None]),
        ({"allocated": {1: 512}}, [1]),
        ({"allocated": {1: 512}, "bound": ("xpu", 2), "local_rank": "0"}, [0, 1, 2]),
    ],
)
def test_which_of_several_devices(torch, monkeypatch, has, expected):
    """The current device is a thread's own, and on ours it is the first: not the one to wait for."""
    waited = []
    torch.xpu = module(waited, count=4)
    if "allocated" in has:
        torch.xpu.memory_allocated = lambda index: has["allocated"].get(index, 0)
    if "bound" in has:
        torch.add("0", "xpu:xccl", bound=has["bound"])
    if "local_rank" in has:
        monkeypatch.setenv("LOCAL_RANK", has["local_rank"])
    assert operations.drain() is None
    assert waited == expected


def test_sequence_numbers(torch):
    assert operations.sequence_numbers() == {}
    torch.add("0", "cpu:gloo,cuda:nccl", launched={"cpu": 2, "cuda": 40})
    torch.add("1", "cuda:nccl", launched={"cuda": 7})
    torch.add("2", "gloo", launched={"cpu": 5})
    torch.add("3", "neuron:nccom", launched={"neuron": 9}, counts=False)
    torch.add("4", "mpi", counts=False)
    assert operations.sequence_numbers() == {"0/cpu": 2, "0/cuda": 40, "1": 7, "2": 5, "3": 9}


ENTRIES = [
    {
        "process_group": ["0", ""],
        "collective_seq_id": 4,
        "profiling_name": "nccl:all_reduce",
        "state": "completed",
    },
    {
        "process_group": ["1", ""],
        "collective_seq_id": 5,
        "profiling_name": "nccl:broadcast",
        "state": "completed",
    },
    {
        "process_group": ["0", ""],
        "collective_seq_id": 5,
        "profiling_name": "nccl:_all_gather_base",
        "state": "started",
    },
]
STATUS = {"0": {"last_enqueued_collective": "6", "last_completed_collective": "4"}}


def as_json(**options):  # 2.5 and later
    assert options.keys() == {"includeCollectives", "onlyActive"}
    entries = {"entries": ENTRIES} if options["includeCollectives"] else {}
    return json.dumps({"pg_status": STATUS, **entries}).encode()


def as_pickle(**options):  # 2.4
    if options.keys() != {"includeCollectives", "includeStackTraces", "onlyActive"}:
        raise TypeError("incompatible function arguments")
    return pickle.dumps(
        json.loads(as_json(**{k: v for k, v in options.items() if k != "includeStackTraces"}))
    )


@pytest.mark.parametrize("dumps", [{"_json": as_json}, {"": as_pickle}, {"_json": as_json, "": as_pickle}])
def test_the_flight_recorder(torch, tmp_path, dumps):
    for suffix, dump in dumps.items():
        setattr(torch.recorders, f"_dump_nccl_trace{suffix}", dump)
    torch.cuda = module([])
    torch.add("0", "cuda:nccl", launched={"cuda": 6})
    torch.add("1", "cuda:nccl", launched={"cuda": 5})
    first = operations.progress()
    assert first is not None and hash(first) and first == operations.progress()
    torch.add("2", "cuda:nccl", launched={"cuda": 1})
    assert first != operations.progress()
    stuck = operations.stuck_collective()
    assert stuck == {"op": None, "seq": 5, "group": "0"}
    written = operations.evidence(str(tmp_path / "report"), stuck)
    assert written == [str(tmp_path / "report-nccl.trace")] == [str(path) for path in tmp_path.iterdir()]
    assert stuck["op"] == "_all_gather_base"


def test_a_dump_goes_through_no_link_and_over_no_file(torch, tmp_path):
    """In a folder that all may write: a user who knows host, pid and time knows the name, too."""
    torch.recorders._dump_nccl_trace_json = as_json
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "reports"
    folder.mkdir()
    planted = [folder / f"report-nccl.trace.{os.getpid()}", folder / ".report-nccl.trace"]
    for path in planted:
        path.symlink_to(precious)
    (written,) = operations.evidence(str(folder / "report"))
    assert json.loads((folder / "report-nccl.trace").read_bytes())["entries"]
    assert precious.read_text() == "precious"
    assert (folder / "report-nccl.trace").stat().st_mode & 0o133 == 0
    assert {str(path) for path in folder.iterdir()} == {written, *map(str, planted)}
    (folder / "other-nccl.trace").symlink_to(precious)
    with pytest.raises(FileExistsError):
        operations.evidence(str(folder / "other"))
    assert precious.read_text() == "precious" and (folder / "other-nccl.trace").is_symlink()


def test_entries_are_not_asked_for_while_a_device_may_hang(torch):
    """Torch asks the driver for them with the GIL held."""
    asked = []

    def dump(**options):
        asked.append(options["includeCollectives"])
        return as_json(**options)

    torch.recorders._dump_nccl_trace_json = dump
    torch.cuda = module([])
    operations.progress()
    operations.stuck_collective()
    assert asked and not any(asked)
    torch.cuda = module([], used=False)
    assert operations.stuck_collective() == {"op": "_all_gather_base", "seq": 5, "group": "0"}


def test_a_flight_recorder_that_is_off_or_absent(torch, tmp_path):
    assert operations.progress() is operations.stuck_collective() is None
    assert operations.evidence(str(tmp_path / "report")) == []
    collectives._found.clear()
    torch.recorders._dump_nccl_trace_json = lambda **_: b'{"version": "2.4"}'
    torch.recorders._dump_fr_trace_json = lambda **_: 1 / 0
    assert operations.progress() is operations.stuck_collective() is None
    assert operations.evidence(str(tmp_path / "report")) == []


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_the_abort_of_a_backend_before_groups_had_one(torch, kind):
    """2.4 to 2.6: on the backend, whichever kind of device that is for."""
    aborted = []
    group = torch.add("0", f"cpu:gloo,{kind}:ccl", launched={"cpu": 0, kind: 1})
    group._get_backend = lambda device: {kind: SimpleNamespace(abort=lambda: aborted.append(device))}[device]
    torch.add("1", "cpu:gloo", launched={"cpu": 1})
    done = threading.Event()
    assert operations.can_abort()
    operations.abort(lambda problem: problem or done.set())
    assert done.wait(20) and aborted == [kind]

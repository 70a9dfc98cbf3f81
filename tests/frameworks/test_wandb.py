"""Weights & Biases learns of an eviction: read from what its own process wrote, offline."""

import struct

import pytest
from harness import NONE, SIGTERM, wait_until

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]

START = 240.0
_HEADER = 7  # bytes of the file, and of each piece: checksum, length, type
_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


def records(path):
    """The records of a .wandb file: pieces in blocks, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + _HEADER])
        piece = data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        record = piece if kind in (_FULL, _FIRST) else record + piece
        if kind in (_FULL, _LAST):
            yield Record.FromString(record)


def preempting(job, rank):
    """Whether the run of this rank was marked; what wandb's process has yet to write, it writes soon."""
    (path,) = job.folder.glob(f"wandb-{rank}/wandb/offline-run-*/*.wandb")
    return any(record.WhichOneof("record_type") == "preempting" for record in records(path))


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def world(job, *args, **options):
    ranks = job.world("fw_wandb.py", 2, *args, fresh=True, AUTOTEARDOWN_GRACE=60, **options)
    for rank in ranks:
        rank.wait_for(r"^rank \d pid \d+ step 3$", START)
    return ranks


def test_both_runs_are_marked(job):
    """That of the rank that is signalled, and that of its peer."""
    ranks = world(job)
    ranks[1].signal()
    assert [ranks[1].outlast(60), ranks[0].outlast(60)] == [0, 143], ranks[0].transcript()
    for rank in range(2):
        wait_until(lambda rank=rank: preempting(job, rank), f"the mark of rank {rank}", 30)


def test_a_rank_without_a_run(job):
    ranks = world(job, "none")
    ranks[1].signal()
    assert [ranks[1].outlast(60), ranks[0].outlast(60)] == [0, 143], ranks[0].transcript()
    assert not any("failed" in line for line in ranks[1].noise), ranks[1].transcript()
    wait_until(lambda: preempting(job, 0), "the mark of rank 0", 30)


def test_control_without_the_agent(job):
    """Nothing is marked: the default action ends the rank."""
    ranks = world(job, mode=NONE)
    ranks[1].signal()
    assert ranks[1].wait() == -SIGTERM
    ranks[0].wait()
    assert not preempting(job, 1)

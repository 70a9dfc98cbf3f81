"""What has to be there after an eviction of `programs/background.py`: shared by the worlds in which it runs."""

import torch
import torch.distributed.checkpoint as dcp
from harness import wait_until

STYLES = ["none", "flag", "callback", "poll"]


def begun(ranks, patience):
    """Wait until the other threads' collectives are under way, and the training with them."""
    for rank in ranks:
        rank.wait_for("^saving", patience)
    counts = [rank.stdout.count("step") for rank in ranks]
    for rank, count in zip(ranks, counts):
        wait_until(
            lambda rank=rank, count=count: rank.stdout.count("step") > count + 8, "more iterations", patience
        )


def steps(ranks):
    """The last iteration that each rank has printed."""
    return [
        int([line for line in rank.stdout.splitlines() if line.startswith("step")][-1].split()[1])
        for rank in ranks
    ]


def judge(job, ranks, what, style, transcript, uneven=False):
    """The same iteration, saved, and the save of the other thread whole. `uneven`: the ranks' weights differ.

    A thread that launches on a device for ever has launched again when the agent destroys its group, which cannot end.
    """
    released = "aborted" if what == "device" and style in ("none", "callback") else "clean"
    assert len(set(steps(ranks))) == 1, transcript()
    saved = [job.folder / f"final-{rank}.pt" for rank in range(len(ranks))]
    if style == "none":
        assert not any(path.exists() for path in saved), transcript()
        outcomes = [rank.report()["outcome"] for rank in ranks]
        assert outcomes == [released] * len(ranks), transcript()
        stopped = {rank.report()["steps"]["stopped_at"] for rank in ranks}
        assert len(stopped) == 1 + uneven, transcript()
    else:
        assert all(path.exists() for path in saved), transcript()
        parts = [torch.load(path) for path in saved]
        assert [part["step"] for part in parts] == steps(ranks), transcript()
        for name, first in parts[0]["weights"].items() if not uneven else ():
            assert all(torch.equal(first, part["weights"][name]) for part in parts), f"{name}: {transcript()}"
        reports = [rank.report() for rank in ranks]
        assert [report["outcome"] for report in reports] == [released] * len(ranks), transcript()
        ended = {report["ended_by"] for report in reports}
        assert ended == {"agent" if style == "callback" else "application"}, transcript()
    if what in ("async", "process"):
        found = sorted(job.folder.glob("dcp-*"))
        assert found, transcript()
        for folder in found:
            assert (folder / ".metadata").exists(), f"{folder.name} is torn: {transcript()}"
            model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
            state = {"model": {f"module.{name}": value for name, value in model.state_dict().items()}}
            dcp.load(state, checkpoint_id=folder)

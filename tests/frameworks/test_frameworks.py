"""Real frameworks, as their documentation uses them, with and without the agent (`make frameworks`).

For each: does its own checkpoint on SIGTERM still happen, whole; who leaves with what code; is the rank gone inside the
grace period when the framework hangs. What holds with the agent must hold without it, too: where `mode` is a parameter,
NONE is the control.

A framework takes long to import on a busy machine, so the limits are wide. Where ranks are processes of their own
(`job.world`), as the pods of a PyTorchJob are, the exit codes are those that the platform sees.
"""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from harness import AGENT, NONE, SIGTERM, alive, wait_until

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]

START = 240.0
# Time enough for what the framework does by itself, and not much of it for a framework that hangs.
PATIENT = {"AUTOTEARDOWN_GRACE": 60}
HANGS = {"AUTOTEARDOWN_GRACE": 15, "AUTOTEARDOWN_YIELD": 3}
BOTH = pytest.mark.parametrize("mode", [AGENT, NONE])
EACH_SIGNALLED = object()


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No hub, no GPU, no configuration of the user's."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
    }.items():
        monkeypatch.setenv(name, value)


def train(ranks, step=3):
    """Wait until every rank has said that it is at this step."""
    for rank in ranks:
        rank.wait_for(rf"^rank \d pid \d+ step {step}$", START)


def workers(launcher, text=None, count=2):
    """The pids of a launcher's ranks, by rank, once they train."""

    def look():
        assert launcher.running, launcher.transcript()
        found = re.findall(
            r"^rank (\d) pid (\d+) step [3-9]", text() if text else launcher.stdout, re.MULTILINE
        )
        return {int(rank): int(pid) for rank, pid in found}

    return wait_until(lambda: len(look()) == count and look(), "training", START)


def left_alone(ranks):
    """The framework dealt with it: the agent has nothing to report."""
    for rank in ranks:
        assert not [text for text in rank.log_lines if text.startswith("done")], rank.transcript()


def stopped_together(job, causes, codes, outcome="clean"):
    """The agent dealt with it: all at the same step, drained and released."""
    reports = job.all_reports()
    found = {rank: report["cause"] for rank, report in reports.items()}
    if causes is EACH_SIGNALLED:
        # Word of a peer may be faster than a rank's own signal. Its code is that of a signalled rank all the same.
        assert "signal" in found.values() and set(found.values()) <= {"signal", "peer"}, found
    else:
        assert found == causes
    assert {rank: report["exit_code"] for rank, report in reports.items()} == codes
    assert {report["outcome"] for report in reports.values()} == {outcome}, reports
    assert len({report["steps"]["stopped_at"] for report in reports.values()}) == 1, reports


def out_in_time(rank, code, grace=15):
    """Gone by GRACE - 1, and not SIGKILLed."""
    assert rank.outlast(grace) == code, rank.transcript()


# -- PyTorch Lightning ------------------------------------------------------------------------------------------------


def lightning_checkpoint(folder):
    """Its checkpoint, which must load."""
    import torch

    (path,) = folder.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    assert checkpoint["global_step"] >= 2
    return checkpoint


def lightning_code():
    """Its own on SIGTERM: 0 in 2.6, to be 143 (Lightning-AI/pytorch-lightning#21623)."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return SIGTERMException().code or 0


@BOTH
def test_lightning_saves_and_leaves(job, mode, tmp_path):
    """All ranks are signalled, as on a node: it stops at the end of the step, saves, and exits (0 with 2.6)."""
    pytest.importorskip("lightning")
    ranks = job.world("fw_lightning.py", 2, tmp_path / "own", fresh=True, mode=mode, **PATIENT)
    train(ranks)
    for rank in ranks:
        rank.signal()
    for rank in ranks:
        assert rank.outlast(60) == lightning_code(), rank.transcript()
    left_alone(ranks)
    lightning_checkpoint(tmp_path / "own")


@BOTH
def test_lightning_with_its_own_launcher(job, mode, tmp_path):
    """SIGTERM to the script that has started the other rank: its handler passes it on."""
    pytest.importorskip("lightning")
    script = job.start("fw_lightning.py", tmp_path / "own", fresh=True, mode=mode, **PATIENT)
    workers(script)
    script.signal()
    assert script.outlast(60) == lightning_code(), script.transcript()
    left_alone([script])
    lightning_checkpoint(tmp_path / "own")
    wait_until(lambda: not job.survivors(), "the other rank's end", 30)


def test_lightning_and_one_signal(job, tmp_path):
    """SIGTERM to one rank: its handler broadcasts. It runs on all of them, after the same step, and all save."""
    pytest.importorskip("lightning")
    ranks = job.world("fw_lightning.py", 2, tmp_path / "own", fresh=True, **PATIENT)
    train(ranks)
    ranks[1].signal()
    for rank in ranks:
        rank.signalled = ranks[1].signalled
        assert rank.outlast(60) == lightning_code(), rank.transcript()
    left_alone(ranks)
    lightning_checkpoint(tmp_path / "own")


def test_control_lightning_hangs_in_its_handler(job, tmp_path):
    """Without the agent it waits there for the others, which do not join: it never ends by itself."""
    pytest.importorskip("lightning")
    ranks = job.world("fw_lightning.py", 2, tmp_path / "own", fresh=True, mode=NONE, **HANGS)
    train(ranks)
    ranks[1].signal()
    assert ranks[1].outlast(15) == -signal.SIGKILL, ranks[1].transcript()


def test_lightning_without_its_time(job, tmp_path):
    """AUTOTEARDOWN_YIELD=off, for platforms that evict single ranks: the group stops after one step, at once."""
    pytest.importorskip("lightning")
    options = {**PATIENT, "AUTOTEARDOWN_YIELD": "off"}
    ranks = job.world("fw_lightning.py", 2, tmp_path / "own", fresh=True, **options)
    train(ranks)
    ranks[1].signal()
    out_in_time(ranks[1], 0, 60)
    out_in_time(ranks[0], 143, 60)
    stopped_together(job, {0: "peer", 1: "signal"}, {0: 143, 1: 0})
    assert "Received SIGTERM" not in ranks[1].stderr
    lightning_checkpoint(tmp_path / "own")


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_trainer_without_its_checkpoint(job, tmp_path):
    """The agent stops all ranks after the same step."""
    pytest.importorskip("transformers")
    ranks = job.world("fw_trainer.py", 2, tmp_path / "own", fresh=True, **PATIENT)
    train(ranks)
    ranks[1].signal()
    out_in_time(ranks[1], 0, 60)
    out_in_time(ranks[0], 143, 60)
    stopped_together(job, {0: "peer", 1: "signal"}, {0: 143, 1: 0})


def test_control_trainer_without_its_checkpoint(job, tmp_path):
    """It dies of the signal; its peer finds out from gloo, and would not from NCCL."""
    pytest.importorskip("transformers")
    ranks = job.world("fw_trainer.py", 2, tmp_path / "own", fresh=True, mode=NONE)
    train(ranks)
    ranks[1].signal()
    assert ranks[1].wait() == -SIGTERM
    assert ranks[0].wait() == 1


@BOTH
def test_trainer_just_in_time_checkpoint(job, mode, tmp_path):
    """`enable_jit_checkpoint`: 3 s after the signal it saves at a step and ends the training: whole, exit 0."""
    transformers = pytest.importorskip("transformers")
    ranks = job.world("fw_trainer.py", 2, tmp_path / "own", "jit", fresh=True, mode=mode, **PATIENT)
    train(ranks)
    for rank in ranks:
        rank.signal()
    for rank in ranks:
        assert rank.outlast(60) == 0, rank.transcript()
        assert "trained" in rank.stdout
    left_alone(ranks)
    (folder,) = (tmp_path / "own").glob("checkpoint-*")
    assert not (folder / "checkpoint-is-incomplete.txt").exists()
    transformers.GPT2LMHeadModel.from_pretrained(folder)
    state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert folder.name == f"checkpoint-{state.global_step}"


@BOTH
def test_trainer_just_in_time_checkpoint_hangs(job, mode, tmp_path):
    """Rank 1 is stuck, so rank 0 never gets to the step at which it would save."""
    pytest.importorskip("transformers")
    ranks = job.world("fw_trainer.py", 2, tmp_path / "own", "jit", fresh=True, mode=mode, **HANGS)
    train(ranks)
    (job.folder / "stuck").touch()
    for rank in ranks:
        rank.signal()
    for rank in ranks:
        out_in_time(rank, 0 if mode == AGENT else -signal.SIGKILL)


@pytest.mark.parametrize("who", ["launcher", "rank"])
def test_accelerate_launch(job, who):
    """Its launcher is torchrun's; its optimizer wrapper still counts as a step. The launcher returns 1, as torchrun."""
    pytest.importorskip("accelerate")
    python = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
    options = (
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        "--monitor_interval=0.1",
    )
    launcher = job.start("fw_accelerate.py", fresh=True, python=python + options, **PATIENT)
    pids = workers(launcher)
    if who == "rank":
        os.kill(pids[1], SIGTERM)
    else:
        launcher.signal()
    assert launcher.wait() == 1
    if who == "rank":
        stopped_together(job, {0: "peer", 1: "signal"}, {0: 143, 1: 0})
    else:
        stopped_together(job, EACH_SIGNALLED, {0: 0, 1: 0})
    assert not any(map(alive, pids.values()))


# -- DeepSpeed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["launcher", "rank"])
def test_deepspeed(job, who):
    """ZeRO's optimizer counts as a step; launch.py, which starts the ranks, signals each in turn and gives it 30 s."""
    pytest.importorskip("deepspeed")
    python = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", "--no_local_rank", "--save_pid")
    launcher = job.start("fw_deepspeed.py", fresh=True, python=python, **PATIENT)
    pids = workers(launcher)
    launch = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pids[1] if who == "rank" else launch, SIGTERM)
    launcher.wait()
    if who == "rank":
        stopped_together(job, {0: "peer", 1: "signal"}, {0: 143, 1: 0})
    else:
        # One after the other, and only when the last one has ended: the peers are faster.
        stopped_together(job, {0: "signal", 1: "peer"}, {0: 0, 1: 143})
    assert not any(map(alive, pids.values()))


# -- handlers as in Megatron-LM, NeMo, OLMo-core; as in Composer -------------------------------------------------------


@BOTH
def test_flag_and_all_gather(job, mode, tmp_path):
    """Megatron-LM's way. One rank is signalled; all see the flag, save and exit 0. The agent does not disturb them."""
    ranks = job.world("fw_flag.py", 2, tmp_path / "own", fresh=True, mode=mode, **PATIENT)
    train(ranks)
    ranks[1].signal()
    for rank in ranks:
        assert rank.outlast(60) == 0, rank.transcript()
        assert "exiting program" in rank.stdout
    left_alone(ranks)
    assert loads(tmp_path / "own") >= 3


def loads(folder):
    """Load a distributed checkpoint, all of it, and return its step."""
    import torch
    import torch.distributed.checkpoint as dcp

    model = {"module.weight": torch.full((1, 4), torch.nan), "module.bias": torch.full((1,), torch.nan)}
    state = {"model": model, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    assert not any(tensor.isnan().any() for tensor in model.values())
    return state["step"]


@BOTH
def test_flag_and_all_gather_hangs(job, mode, tmp_path):
    """Rank 1 never comes to the all_gather, so nobody ever sees the flag."""
    ranks = job.world("fw_flag.py", 2, tmp_path / "own", fresh=True, mode=mode, **HANGS)
    train(ranks)
    (job.folder / "stuck").touch()
    ranks[0].signal()
    if mode == NONE:
        assert ranks[0].outlast(15) == -signal.SIGKILL
        return
    out_in_time(ranks[0], 0)
    ranks[1].signalled = ranks[0].signalled
    out_in_time(ranks[1], 143)


@BOTH
def test_handler_at_import_that_exits(job, mode, tmp_path):
    """Composer's way: `sys.exit(128 + n)` and a save at exit, on each rank that is signalled."""
    import torch

    ranks = job.world("fw_exit_handler.py", 2, tmp_path, fresh=True, mode=mode, **PATIENT)
    train(ranks)
    for rank in ranks:
        rank.signal()
    for index, rank in enumerate(ranks):
        assert rank.outlast(60) == 143, rank.transcript()
        assert set(torch.load(tmp_path / f"rank{index}.pt")) == {"weight", "bias"}
    left_alone(ranks)


# -- submitit ---------------------------------------------------------------------------------------------------------


def submitted(job, folder, **options):
    """A job of two tasks; return its driver, its controller's pid, and what its tasks print."""
    pytest.importorskip("submitit")
    driver = job.start("fw_submitit.py", folder, fresh=True, **options)
    controller = int(driver.wait_for(r"^controller pid (\d+)$", START)[1])

    def printed():
        return "".join(path.read_text() for path in sorted(folder.glob("*_log.out")))

    return driver, controller, printed


@BOTH
def test_submitit_sigterm(job, mode, tmp_path):
    """Its own SIGTERM handler only logs ("Bypassing signal"): the job would train on until SIGKILL."""
    driver, controller, printed = submitted(job, tmp_path / "own", mode=mode, **HANGS)
    pids = workers(driver, printed)
    os.kill(controller, SIGTERM)  # which it passes on
    if mode == NONE:
        wait_until(lambda: "Bypassing signal SIGTERM" in logs(tmp_path / "own"), "its handler", 30)
        before = printed().count("step")
        wait_until(lambda: printed().count("step") > before + 100, "the training to go on", 30)
        return
    wait_until(lambda: not any(map(alive, pids.values())), "the ranks' end", 30)
    # Its handler had its time, and did not end the program.
    stopped_together(job, EACH_SIGNALLED, {0: 0, 1: 0}, "partial")


def logs(folder):
    """What its tasks log."""
    return "".join(path.read_text() for path in folder.glob("*_log.err"))


@BOTH
def test_submitit_sigusr2(job, mode, tmp_path):
    """Its own early notice: rank 0 checkpoints, the job is queued again and trains on from there."""
    driver, _, printed = submitted(job, tmp_path / "own", mode=mode, **PATIENT)
    pids = workers(driver, printed)
    for pid in reversed(pids.values()):
        os.kill(pid, signal.SIGUSR2)
    wait_until(
        lambda: re.search(r"^rank 0 begins at [1-9]", printed(), re.MULTILINE), "the second attempt", START
    )
    assert "checkpointed" in printed()
    assert not job.all_reports()

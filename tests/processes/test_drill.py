"""`autoteardown drill`: real drills find what they must, and leave nothing behind; bad input."""

import io
import json
import re
import signal
import stat
import subprocess
import sys
import types
import uuid
from html import unescape
from pathlib import Path

import pytest
from browser import look, needs_chromium
from harness import NONE, PATIENCE, environment, marked, wait_until

from autoteardown.cli import drill as command
from autoteardown.cli import main
from autoteardown.drills import display, page, table
from autoteardown.drills.outcome import CUT, NO_CHECKPOINT, WHOLE, Outcome, RankOutcome, check_checkpoint
from autoteardown.drills.scenario import AGENT, HAND_WRITTEN, SCENARIOS
from autoteardown.drills.scenario import NONE as NO_HANDLER

pytestmark = pytest.mark.timeout(
    300
)  # real jobs, and imports of torch that a busy machine takes its time for

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_ddp.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
GRACE = 8


class Drill:
    """A drill that runs, in a caller's environment that ought not to matter."""

    def __init__(self, folder, *words):
        self.mark = uuid.uuid4().hex
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        env = environment(NONE, self.mark, TMPDIR=self.tmp, AUTOTEARDOWN=0, AUTOTEARDOWN_GRACE=3)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autoteardown", "drill", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def stdout(self):
        return self._out.read_text()

    @property
    def stderr(self):
        return self._err.read_text()

    def wait_for(self, text):
        """Wait until it has said so."""
        wait_until(lambda: text in self.stdout or self.process.poll() is not None, repr(text))
        assert text in self.stdout, self.stderr

    def wait(self, left="*"):
        """Its exit status; and nothing of it is left: no process, no file (of a command's own, none but its own)."""
        status = self.process.wait(5 * PATIENCE)
        assert marked(self.mark) == []
        assert list(self.tmp.glob(left)) == []
        return status


@pytest.fixture
def start(tmp_path):
    """Start drills; none outlives the test."""
    started = []

    def start(*words):
        started.append(Drill(tmp_path / str(len(started)), *words))
        return started[-1]

    yield start
    for drill in started:
        drill.process.kill()
        drill.process.wait()
        wait_until(lambda drill=drill: not marked(drill.mark), "the launchers to notice")


# -- real drills ----------------------------------------------------------------------------------------------------


WORDS = {
    "train": (
        f"From SIGTERM to SIGKILL there are {GRACE} s",
        "training is at step",
        "SIGTERM to rank 1 (pid ",
        "    rank 1: +0.",  # what the agent says
        "rank 1 has ended: exit 0",
        "clean: all out",
        "scenario  protection",
    ),
    "save": ("SIGTERM to rank 1 (pid ", "clean: all out"),
    "pod": ("which passes it on to its ranks; rank 0 is writing a checkpoint",),
    "stuck": ("rank 0 waits in an all_reduce that no other rank joins",),
    "init": ("the ranks wait in init_process_group",),
    "peer-lost": ("SIGKILL to rank 1 (pid ",),
}
SIGNALLED = {
    "train": [False, True],
    "save": [False, True],
    "pod": [True, True],
    "stuck": [True, False],
    "init": [True, True],
    "peer-lost": [True, False],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_agent_comes_out_clean(start, tmp_path, name):
    """Every rank out in time with the right code, none killed, the checkpoint whole, all at the same step.

    Told as JSON, in words that a person can follow meanwhile, and as a page.
    """
    html = tmp_path / "page.html"
    drill = start("--scenario", name, "--grace", GRACE, "--json", "--html", html)
    assert drill.wait() == 0, drill.stderr
    answer = json.loads(drill.stdout)
    (found,) = answer["outcomes"]
    assert answer["clean"] and found["clean"] and found["problems"] == []
    assert (found["scenario"], found["protection"], found["backend"]) == (name, AGENT, "gloo")
    assert (found["hanging"], found["sigkilled"]) == (0, 0)
    assert 0 < found["seconds"] < GRACE
    assert found["checkpoint"] == (None if name == "init" else WHOLE)
    assert found["same_step"] is (None if name in ("stuck", "init") else True)
    if name == "save":
        assert found["steps_lost"] == 0
    ranks = found["ranks"]
    assert [rank["signalled"] for rank in ranks] == SIGNALLED[name]
    codes = {rank["pid"]: rank["exit_code"] for rank in ranks}
    if name == "peer-lost":
        assert ranks[0]["exit_code"] in (0, 1) and ranks[1]["exit_code"] == -signal.SIGKILL
    else:
        assert {report["pid"]: report["exit_code"] for report in found["reports"]} == codes
        for rank in ranks:
            alone = rank["signalled"] and name in ("train", "save", "stuck")
            assert rank["exit_code"] in ({0} if alone else {0, 143}), codes
    for words in WORDS[name]:
        assert words in drill.stderr
    self_contained(html.read_text("utf-8"), SCENARIOS[name].title)


def self_contained(text, title):
    """One file with a drawing: nothing is fetched."""
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:|//|[\w./]+\.(js|css|png))", text)
    assert "default-src 'none'" in unescape(text)
    assert text.count("<section>") == text.count("grace period ends") == 1
    assert title in text and "What the agent said" in text


def test_the_controls_fail_where_a_rank_is_stuck(start):
    """The hand-written handler is SIGKILLed, no handler means no teardown; only the agent's column counts."""
    drill = start("--scenario", "stuck", "--compare", "--grace", GRACE, "--json")
    assert drill.wait() == 0, drill.stderr
    answer = json.loads(drill.stdout)
    found = {outcome["protection"]: outcome for outcome in answer["outcomes"]}
    assert list(found) == [NO_HANDLER, HAND_WRITTEN, AGENT]
    assert answer["clean"] and found[AGENT]["clean"]
    control = found[HAND_WRITTEN]
    assert not control["clean"] and control["sigkilled"] == 1 and control["hanging"] == 1
    assert control["ranks"][0]["exit_code"] == -signal.SIGKILL
    assert control["ranks"][0]["seconds"] >= GRACE
    assert control["reports"] == []
    bare = found[NO_HANDLER]
    assert not bare["clean"] and bare["reports"] == []
    assert bare["ranks"][0]["exit_code"] == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_compared(start):
    """All scenarios, all protections: a row each, and the agent's are all clean."""
    drill = start("--compare")
    assert drill.wait() == 0, drill.stdout + drill.stderr
    _, _, rows = drill.stdout.partition("\nscenario ")
    verdicts = re.findall(r"^.{25}(yes|no) ", rows, re.MULTILINE)
    assert max(map(len, rows.splitlines())) <= 80, drill.stdout
    assert len(verdicts) == 3 * len(SCENARIOS) and set(verdicts[2::3]) == {"yes"}, drill.stdout
    for name in ("stuck", "init"):
        assert verdicts[3 * list(SCENARIOS).index(name) + 1] == "no", drill.stdout


@pytest.mark.slow
def test_more_ranks(start):
    """Four of them."""
    drill = start("--ranks", 4, "--scenario", "train,pod", "--json")
    assert drill.wait() == 0, drill.stderr
    for outcome in json.loads(drill.stdout)["outcomes"]:
        assert len(outcome["ranks"]) == 4 and outcome["same_step"]


# -- a command of the user's ------------------------------------------------------------------------------------------


def test_the_example_script(start):
    """The user's own launch command: found by its armed ranks, one evicted, its reports shown; its output is seen."""
    drill = start("--json", "--grace", GRACE, "--after", 6, "--", sys.executable, *TORCHRUN, EXAMPLE)
    assert drill.wait("autoteardown*") == 0, drill.stderr
    assert "autoteardown: torchrun: its workers were evicted (exited with 143); exit 1" in drill.stderr
    (found,) = json.loads(drill.stdout)["outcomes"]
    assert found["clean"] and found["backend"] == "gloo"
    assert [rank["exit_code"] for rank in found["ranks"]] == [143, 0]
    assert [report["outcome"] for report in found["reports"]] == ["clean", "clean"]


def test_a_command_compared(start):
    """The same command with the agent off: its ranks are found without a registry, and evicted as late."""
    words = (sys.executable, *TORCHRUN, EXAMPLE)
    drill = start("--compare", "--json", "--grace", GRACE, "--after", 2, "--", *words)
    assert drill.wait("autoteardown*") == 0, drill.stderr
    control, found = json.loads(drill.stdout)["outcomes"]
    assert (control["protection"], found["protection"]) == (NO_HANDLER, AGENT)
    assert found["clean"] and not control["clean"] and control["reports"] == []
    assert [rank["rank"] for rank in control["ranks"]] == [0, 1]
    assert [rank["signalled"] for rank in control["ranks"]] == [False, True]


@pytest.mark.slow
def test_a_command_and_its_pod(start):
    """The signal goes to the launch command."""
    drill = start("--scenario", "pod", "--ranks", 2, "--", sys.executable, *TORCHRUN, EXAMPLE)
    assert drill.wait("autoteardown*") == 0, drill.stdout + drill.stderr
    assert "SIGTERM to the command" in drill.stdout
    assert "0, 0" in drill.stdout


def test_a_command_that_arms_nothing(start):
    """It is told so, and the command ends with the drill, even what has left its tree."""
    shell = "setsid sh -c 'sleep 300 & sleep 300' & exec sleep 300"
    drill = start("--start-timeout", 1, "--", "sh", "-c", shell)
    assert drill.wait("autoteardown*") == 1
    assert "no rank was armed after 1 s; `autoteardown doctor`" in drill.stdout


def test_a_command_that_ends_by_itself(start):
    """Before anybody was evicted."""
    drill = start("--", "sh", "-c", "exit 3")
    assert drill.wait("autoteardown*") == 1
    assert "ended by itself, with exit 3, before it was evicted" in drill.stdout


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted(start, signum):
    """Ctrl-C leaves nothing behind, also when it is pressed again and again. Until then it is nobody else's."""
    drill = start("--scenario", "stuck")
    drill.wait_for("all ranks are up")
    (folder,) = drill.tmp.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for _ in range(20):
        drill.process.send_signal(signum)
    assert drill.wait() == 128 + signum, drill.stderr
    assert "Traceback" not in drill.stderr


def test_killed(start):
    """A drill that is SIGKILLed takes its job with it."""
    drill = start()
    drill.wait_for("all ranks are up")
    drill.process.kill()
    wait_until(lambda: not marked(drill.mark), "the launcher to notice")


def test_a_job_that_does_not_get_going(start):
    """The drill has not shown anything: exit 1, and what the job has printed."""
    drill = start("--start-timeout", 1)
    assert drill.wait() == 1
    assert "not clean: not ready for an eviction after 1 s" in drill.stdout


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--ranks 0", "argument --ranks: '0' is not a whole number from 1 to 64"),
        ("--ranks two", "argument --ranks: 'two' is not a whole number from 1 to 64"),
        (
            "--scenario quake",
            "argument --scenario: 'quake' is not a scenario; allowed are stuck, train, save, pod, init, peer-lost",
        ),
        ("--scenario train,", "argument --scenario: '' is not a scenario; allowed are stuck"),
        ("--scenario stuck --ranks 1", "--ranks 1: the scenario stuck needs at least 2"),
        ("--scenario all --ranks 1", "--ranks 1: the scenario stuck needs at least 2"),
        ("--compare --ranks 1", "--ranks 1: the scenario stuck needs at least 2"),
        ("--grace 1.9", "argument --grace: '1.9' is not a number of seconds from 2 to 3600"),
        ("--grace nan", "argument --grace: 'nan' is not a number of seconds"),
        (
            "--start-timeout soon",
            "argument --start-timeout: 'soon' is not a number of seconds from 1 to 3600",
        ),
        ("--html /nowhere/page.html", "--html '/nowhere/page.html': not a file in a folder that exists"),
        ("--html /", "--html '/': not a file in a folder that exists"),
        ("--after 3", "--after: only with a COMMAND of your own"),
        ("-- no-such-program", "COMMAND 'no-such-program': no such program"),
        (
            "--scenario init -- true",
            "--scenario init: a COMMAND of your own can only be drilled in one of: train, pod",
        ),
    ],
)
def test_bad_input(capsys, words, complaint):
    """Option, value, what is allowed; exit 2; nothing is started."""
    with pytest.raises(SystemExit) as ended:
        main(["drill", *words.split()])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, remedy", [("torch", "pip install torch"), ("sklearn", "pip install scikit-learn")]
)
def test_missing_packages(monkeypatch, capsys, module, remedy):
    """What is missing, and how to get it; exit 2."""
    find = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == module else find(name))
    assert main(["drill"]) == 2
    assert remedy in capsys.readouterr().err


def test_where_the_agent_cannot_start(monkeypatch, capsys):
    """A drill of the agent without it would say nothing; exit 2."""
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    monkeypatch.setattr(command, "environment", lambda *args, **options: {"AUTOTEARDOWN": "off"})
    assert main(["drill"]) == 2
    assert "autoteardown doctor" in capsys.readouterr().err


# -- judgement and looks ----------------------------------------------------------------------------------------------


def outcome(protection=AGENT, scenario="train", checkpoint=WHOLE, **changes):
    """A clean one, but for rank 1's changes."""
    ranks = [
        RankOutcome(0, 10, 143, 0.2, {0, 143}, step=7),
        RankOutcome(**{**vars(RankOutcome(1, 11, 0, 0.1, {0}, signalled=True, step=7)), **changes}),
    ]
    return Outcome(scenario, protection, 10.0, ranks, "gloo", 1, checkpoint, compares_steps=True)


def test_clean():
    """The control of the test below."""
    assert outcome().clean
    assert outcome().summary() == "clean: all out 200 ms after the signal, all at step 7"


@pytest.mark.parametrize(
    "changes, wrong",
    [
        ({"code": 1}, "rank 1 ended with exit 1 where 0 is right"),
        ({"code": -15}, "rank 1 died of SIGTERM, without a teardown"),
        ({"code": None}, "rank 1 ended without a teardown; the exit code is not known"),
        ({"sigkilled": True}, "rank 1 still ran when the grace period ended, and was SIGKILLed"),
        ({"hanging": True, "code": None, "seconds": None}, "rank 1 left hanging"),
        ({"step": 8}, "the ranks stopped at different steps: 7, 8"),
        ({"checkpoint": CUT}, "the last checkpoint was cut in half"),
    ],
)
def test_what_is_not_clean(changes, wrong):
    """Each of these alone spoils it, and is marked in the table."""
    found = outcome(**changes)
    assert not found.clean
    assert any(line.startswith(wrong) for line in found.wrong), found.wrong
    (row,) = table.rows([found])
    assert row[2].text == "no" and row[2].bad
    killed = dict(zip(table.HEAD, row))["KILL"]
    assert (killed.text, killed.bad) == (("1", True) if "sigkilled" in changes else ("0", False))


def test_no_report_is_not_clean(tmp_path):
    """The agent has to have left one for each rank, with the exit code that the launcher saw."""
    found = outcome()
    report = {
        "schema": 1,
        "host": "h",
        "pid": 11,
        "rank": 1,
        "world_size": 2,
        "cause": "signal",
        "phases": [],
    }
    (tmp_path / "h-11.json").write_text(json.dumps({**report, "outcome": "clean", "exit_code": 143}))
    found.read_reports(tmp_path, found.ranks)
    assert found.wrong == ["rank 0 left no report", "rank 1 reported exit 143, and left with 0"]


def test_checkpoints(tmp_path):
    """Whole, cut anywhere, not there."""
    import torch

    path = tmp_path / "checkpoint.pt"
    assert check_checkpoint(path) == NO_CHECKPOINT
    torch.save({"weights": torch.arange(1000.0)}, path)
    assert check_checkpoint(path) == WHOLE
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert check_checkpoint(path) == CUT, length
    path.write_bytes(content[:2000] + b"\1" + content[2001:])
    assert check_checkpoint(path) == CUT


def hanging(protection=NO_HANDLER):
    """Rank 0 was SIGKILLed, its peer hangs."""
    ranks = [
        RankOutcome(0, 1, -9, 10.01, {0}, signalled=True, sigkilled=True),
        RankOutcome(1, 2, None, None, {143}, hanging=True),
    ]
    return Outcome("stuck", protection, 10.0, ranks)


def freed():
    """With the agent, both were out."""
    ranks = [RankOutcome(0, 1, 0, 0.2, {0}, signalled=True), RankOutcome(1, 2, 143, 0.12, {143})]
    return Outcome("stuck", AGENT, 10.0, ranks)


def test_the_headline_is_what_the_agent_is_for():
    """The hang, and how long it took to free the peers."""
    assert table.headline([hanging(), hanging(HAND_WRITTEN), freed()]) == (
        "stuck: with no handler a peer was still running when the 10 s of grace were over; with the agent, it was free "
        "after 120 ms. With the agent, everything came out clean."
    )
    assert table.headline([freed()]) == "With the agent, everything came out clean."
    assert table.headline([hanging(AGENT)]) == "With the agent, 1 of 1 scenarios did not come out clean."
    text = page.html([hanging(), freed()], "two ranks")
    assert text.index('class="story"') < text.index("<table>") < text.index("<svg y=")


def test_the_table_fits_into_80_columns():
    """Also with the longest of everything."""
    wide = [hanging(HAND_WRITTEN), freed()]
    for each in wide:
        each.scenario, each.compares_steps = "peer-lost", True
        each.ranks[0].step, each.ranks[1].step = 123456, 123457
        each.checkpoint, each.kept = WHOLE, 122457
    assert max(map(len, [*table.lines(wide), *table.LEGEND])) <= 80


def test_peers_freed():
    """Never, where one hangs; not said, where all had the signal."""
    assert (hanging().peers_freed, freed().peers_freed) == (None, 0.12)
    assert [row[3].text for row in table.rows([hanging(), freed()])] == ["never", "120 ms"]
    alone = Outcome("pod", AGENT, 10.0, [RankOutcome(0, 1, 0, 0.2, {0}, signalled=True)])
    assert table.rows([alone])[0][3].text == "-"


def test_many_ranks_in_the_table():
    """Long lists of codes are folded."""
    many = Outcome("train", AGENT, 10.0, [RankOutcome(n, n, 143, 0.1, {143}) for n in range(8)])
    assert table.rows([many])[0][-1].text == "143 (x8)"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code": 0}, "ended, exit 0"),
        ({"code": -signal.SIGTERM}, "died of SIGTERM"),
        ({"code": -signal.SIGKILL, "sigkilled": True}, "died of SIGKILL"),
        ({"code": None, "sigkilled": True}, "died of SIGKILL"),
        ({"code": -signal.SIGKILL, "lost": True}, "lost"),
        ({"code": None, "seconds": None, "hanging": True}, "hangs"),
        ({"code": None, "withdrew": True}, "ended by itself"),
        ({"code": None}, "died"),
    ],
)
def test_a_rank_that_left_no_report_is_drawn_with_a_word(changes, words):
    """However it ended, its lane says so."""
    text = page.html([outcome(NO_HANDLER, **changes)], "two ranks")
    assert f">\N{EN DASH} {words}</text>" in text
    assert "exit None" not in text and ">?" not in text and "exit -" not in text


def test_page_escapes():
    """What a job prints is not HTML."""
    found = outcome()
    found.log = ["<script>alert(1)</script>"]
    found.problems = ["<img src=x>"]
    text = page.html([found], "<b>")
    assert "<script>alert" not in text and "<img" not in text and "<b>;" not in text


@needs_chromium
def test_page_in_a_browser(tmp_path):
    """It loads without a complaint; every rank has a lane, every job a row."""
    html = tmp_path / "page.html"
    html.write_text(page.html([outcome(NO_HANDLER, code=-15), outcome()], "two ranks"), "utf-8")
    script = "return ['.lane', 'tbody tr'].map(what => document.querySelectorAll(what).length)"
    seen, console = look(html, script, tmp_path / "browser")
    assert seen == [4, 2]
    assert console == []


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self):
        return True


def show(view):
    """What a view makes of a drill."""
    job = types.SimpleNamespace(label="the agent", status="training, step 3")
    view.scenario(SCENARIOS["train"], [job])
    view.say("the agent", "SIGTERM to rank 1 [pid 4711]")
    view.tick([job])
    view.pause()
    view.outcome(outcome())
    view.table([outcome(), outcome(HAND_WRITTEN, code=-9)])


def test_plain_where_no_terminal_is():
    """Lines, and nothing that steers a terminal."""
    stream = io.StringIO()
    view = display.choose(stream)
    show(view)
    assert type(view) is display.Display
    text = stream.getvalue()
    assert (
        "\x1b" not in text
        and "SIGTERM to rank 1 [pid 4711]" in text
        and re.search(r"hand-written +no ", text)
    ), text


def test_plain_without_rich(monkeypatch):
    """The extra is optional."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert type(display.choose(Terminal())) is display.Display


def test_rich_on_a_terminal(monkeypatch):
    """The same words, in colour."""
    pytest.importorskip("rich")
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    view = display.choose(stream)
    show(view)
    text = stream.getvalue()
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    for words in (
        "SIGTERM to rank 1 [pid 4711]",
        "training, step 3",
        "clean: all out 200 ms",
        "143, KILL",
    ):
        assert words in plain

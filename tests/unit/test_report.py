"""Reports and log lines of a stop: names that are never used twice, and both line formats."""

import errno
import json
import os
import re
import select

import jsonschema
import pytest
import sample_reports as sample
from schema import SCHEMA, validate_report

from autoteardown.node import safe_folder
from autoteardown.stop import report

EVICTED = {"received_at": "2026-11-24T06:59:00.250000+00:00"}
STAMPED = "node-a-4711-20261124T065900Z.json"


@pytest.fixture(autouse=True)
def another_process(monkeypatch):
    """Whatever this process has written before is somebody else's."""
    monkeypatch.setattr(report, "_own", {})


def write(where, name="node-a-4711.json", **fields):
    assert report.write_report(str(where), name, {**EVICTED, **fields}) is None


def contents(where):
    return {path.name: json.loads(path.read_text()) for path in where.iterdir()}


@pytest.mark.parametrize(
    "moment", ["2026-11-24T06:59:00.250000+00:00", "2026-11-24T06:59:00+00:00", "2026-11-24T06:59:00Z"]
)
def test_the_name_has_the_time_of_the_signal(moment):
    assert report.stamped("node-a-4711.json", {"received_at": moment}) == STAMPED


def test_what_a_process_knows_later_replaces_what_it_wrote_earlier(tmp_path):
    write(tmp_path, outcome="forced")
    write(tmp_path, outcome="clean")
    assert {name: value["outcome"] for name, value in contents(tmp_path).items()} == {STAMPED: "clean"}


@pytest.mark.parametrize("links", ["links", "no links"])
def test_another_process_of_that_name_and_second_keeps_its_report(tmp_path, monkeypatch, links):
    """Pods of one image often have the same host name and process ids."""
    if links == "no links":

        def refuse(*args, **options):
            raise PermissionError(errno.EPERM, "no links on this file system")

        monkeypatch.setattr(os, "link", refuse)
    for pod in "abc":
        report._own.clear()
        write(tmp_path, pod=pod)
        write(tmp_path, pod=pod, final=True)
    found = contents(tmp_path)
    stem = STAMPED[: -len(".json")]
    assert set(found) == {STAMPED, f"{stem}-2.json", f"{stem}-3.json"}
    assert {value["pod"] for value in found.values()} == set("abc")
    assert all(value["final"] for value in found.values())


def test_a_restarted_pod_keeps_the_report_of_the_one_before(tmp_path):
    write(tmp_path)
    write(tmp_path, received_at="2026-11-24T08:01:02+00:00")
    assert set(contents(tmp_path)) == {STAMPED, "node-a-4711-20261124T080102Z.json"}


def test_a_name_that_is_taken_is_not_a_reason_to_raise(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        safe_folder.create(descriptor, "x", b"first")
        with pytest.raises(FileExistsError):
            safe_folder.create(descriptor, "x", b"second")
    finally:
        os.close(descriptor)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"first")]


# -- lines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(capfd):
    """A function that gives the lines on fd 2 since it was last asked."""
    return lambda: capfd.readouterr().err.splitlines()


def log(form, **changes):
    made = report.Log(changes.pop("level", "info"), "node-a", changes.pop("job", "llama"), form)
    made.rank, made.world_size = 3, 16
    return made


def test_the_first_line_has_wall_clock_and_job(said):
    log("text").first("SIGTERM: tearing down", 0.004)
    (line,) = said()
    prefix = f"autoteardown rank=3/16 pid={os.getpid()} host=node-a +0.004s SIGTERM: tearing down "
    assert line.startswith(prefix)
    assert re.fullmatch(r"\(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z, job llama\)", line[len(prefix) :])
    log("text", job=None).first("SIGTERM")
    assert re.search(r"SIGTERM \([\d:.TZ-]+\)$", said()[0])


def test_a_line_of_json(said):
    log("json").line("drain ok (0.02s)", 0.412, event="drain", outcome="ok")
    (line,) = said()
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "logger": "autoteardown",
        "level": "info",
        "job": "llama",
        "host": "node-a",
        "pid": os.getpid(),
        "rank": 3,
        "world_size": 16,
        "seconds": 0.412,
        "event": "drain",
        "outcome": "ok",
        "message": "drain ok (0.02s)",
    }


def test_the_first_line_of_json_is_the_signal(said):
    log("json").first("SIGTERM: tearing down", 0.004)
    found = json.loads(said()[0])
    assert (found["event"], found["message"], found["job"]) == ("signal", "SIGTERM: tearing down", "llama")


@pytest.mark.parametrize("letter", ["x", "\n", "\N{GRINNING FACE}", '"'])
def test_a_line_that_is_too_long_is_still_json(said, letter):
    """A pipe takes PIPE_BUF bytes in one piece."""
    log("json").line(letter * 9000)
    (line,) = said()
    assert 1000 < len(line) < select.PIPE_BUF
    assert set(json.loads(line)["message"]) == {letter}


@pytest.mark.parametrize("form", ["text", "json"])
def test_levels(said, form):
    log(form, level="quiet").line("x")
    log(form).line("x", level="debug")
    assert said() == []
    log(form, level="debug").line("x", level="debug")
    assert len(said()) == 1


# -- schema --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "splendid"},
        {"outcome": "partial"},  # without why
        {"schema": 1},
        {"cause": "boredom"},
        {"exit_code": -9},
        {"rank": "0"},
        {"colour": "red"},
        {"phases": [{"name": "coffee", "start": 0, "end": 1, "outcome": "ok", "detail": ""}]},
        {"job": 4711},
        {"received_at": None},
    ],
)
def test_the_schema_refuses_what_is_no_report(changes):
    validate_report(sample.report(0, 2))
    with pytest.raises(jsonschema.ValidationError):
        validate_report({**sample.report(0, 2), **changes})


@pytest.mark.parametrize(
    "value",
    [
        sample.wedged(1, 2),
        sample.forced(1, 2),
        sample.report(1, 2, outcome="partial", why="quiet timed out"),
        {**sample.report(1, 2), "cause": "lost", "job": None, "steps": None, "rank": None},
    ],
)
def test_the_schema_takes_every_outcome(value):
    validate_report(value)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))

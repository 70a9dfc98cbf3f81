"""Logs and metrics: what the docs say of them, and the script that makes metrics of reports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import sample_reports as sample
import yaml

from autoteardown.stop import report

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "docker" / "observe"
PAGE = (ROOT / "docs" / "observe.md").read_text("utf-8")
SAMPLE = re.compile(r'^(\w+)\{(\w+="(?:[^"\\]|\\.)*"(?:,\w+="(?:[^"\\]|\\.)*")*)\} (\S+)$')


def exported(tmp_path, reports):
    """The samples that the script makes of these reports."""
    folder = sample.write(tmp_path / "reports", reports)
    (folder / "cut.json").write_text("{")
    (folder / "cut.notice").write_text("{")
    for number, seconds in enumerate((118.5, 90.25)):
        notice = {"schema": 1, "source": "ec2", "received_at": f"2026-01-0{number + 1}", "seconds": seconds}
        (folder / f"{number}.notice").write_text(json.dumps(notice))
    target = tmp_path / "autoteardown.prom"
    subprocess.run([sys.executable, OBSERVE / "textfile.py", folder, target], check=True, timeout=60)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".prom" or path.name[0] == "."] == [
        target.name
    ]
    found = {}
    for line in target.read_text().splitlines():
        if not line.startswith("#"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            found[name, labels] = float(value)
    return found


def test_the_metrics_of_a_stop(tmp_path):
    found = exported(tmp_path, sample.job(8, {3: sample.wedged}))
    job = 'job_name="4711"'
    assert found["autoteardown_ranks_total", f'{job},outcome="clean"'] == 7
    assert found["autoteardown_ranks_total", f'{job},outcome="aborted"'] == 1
    assert found["autoteardown_ranks_total", f'{job},outcome="forced"'] == 0
    assert found["autoteardown_evictions_total", job] == 1
    assert 13 < found["autoteardown_last_stop_seconds", job] < 14
    assert found["autoteardown_steps_lost_total", job] == 1


def test_the_notices_of_a_cloud(tmp_path):
    found = exported(tmp_path, sample.job(1))
    assert found["autoteardown_notices_total", 'source="ec2"'] == 2
    assert found["autoteardown_seconds_of_notice", 'source="ec2"'] == 90.25


def test_the_name_of_a_job_cannot_forge_a_sample(tmp_path):
    found = exported(tmp_path, [sample.report(0, 1, job='x"} 1\nother{a="\\')])
    assert all(
        'job_name="x\\"} 1\\nother{a=\\"\\\\"' in labels for _, labels in found if "source=" not in labels
    )


def test_reports_that_make_no_sense_cost_the_others_nothing(tmp_path):
    """Any process of any job can write into that folder."""
    good = sample.job(2)
    bad = [
        {"phases": 5},
        {"phases": ["x", None, {"end": "soon"}, {"end": [1]}]},
        {"phases": [{"end": 1e999}]},
        {"job": "\ud800", "outcome": ["x"]},
        {"job": {"a": 1}, "steps": [1]},
        {"received_at": "9999-12-31T23:59"},
        {"received_at": 7, "schema": True},
    ]
    before = exported(tmp_path / "good", good)
    ours = {key: value for key, value in before.items() if 'job_name="4711"' in key[1]}
    assert ours
    hostile = [
        {**sample.report(0, 1), "host": f"theirs-{n}", "job": "theirs", **each} for n, each in enumerate(bad)
    ]
    folder = tmp_path / "bad" / "reports"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "fifo.json")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "large.json").write_bytes(b" " * (5 << 20) + b"{}")
    (folder / "folder.json").mkdir()
    (folder / "link.json").symlink_to("/dev/zero")
    after = exported(tmp_path / "bad", [*good, *hostile])
    assert {key: value for key, value in after.items() if 'job_name="4711"' in key[1]} == ours
    assert all(value == value and value < 1e9 for value in after.values())


def test_every_metric_of_the_page_and_the_dashboard_is_exported(tmp_path):
    names = {name for name, _ in exported(tmp_path, sample.job(2))}
    dashboard = (OBSERVE / "grafana.json").read_text()
    assert set(re.findall(r"autoteardown_[a-z_]+", PAGE)) == names
    about_notices = {"autoteardown_notices_total", "autoteardown_seconds_of_notice"}
    assert set(re.findall(r"autoteardown_[a-z_]+", dashboard)) == names - about_notices


def test_the_dashboard_is_one():
    found = json.loads((OBSERVE / "grafana.json").read_text())
    sources = {each["name"] for each in found["templating"]["list"] if each["type"] == "datasource"}
    assert {panel["datasource"]["uid"] for panel in found["panels"]} == {f"${{{name}}}" for name in sources}
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    boxes = [panel["gridPos"] for panel in found["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    cells = [
        (x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_the_line_on_the_page_is_one_of_ours(capfd):
    shown = json.loads(re.search(r"<!-- example: json -->\n```json\n(.*)\n```", PAGE)[1])
    log = report.Log("info", "node-a", "llama", "json")
    log.rank, log.world_size = 3, 16
    log.line("drain ok (0.02s)", 0.412, event="drain", outcome="ok")
    said = json.loads(capfd.readouterr().err)
    assert list(said) == list(shown)
    volatile = ("time", "pid")
    assert {k: v for k, v in said.items() if k not in volatile} == {
        k: v for k, v in shown.items() if k not in volatile
    }


def test_the_queries_ask_for_fields_that_a_line_has():
    log = report.Log("info", "node-a", "llama", "json")
    fields = set(json.loads(log._as_json("x", 0.0, "info", "done", "clean")))
    queries = re.findall(r"```logql\n(.*?)\n```", PAGE, re.S)
    dashboard = json.loads((OBSERVE / "grafana.json").read_text())
    queries += [
        t["expr"] for p in dashboard["panels"] if p["datasource"]["type"] == "loki" for t in p["targets"]
    ]
    assert len(queries) == 3
    for query in queries:
        _, _, after = query.partition("| json")
        assert set(re.findall(r"\| (\w+)(?:=~|!=|=)", after)) <= fields
        assert set(re.findall(r"{{\.(\w+)}}", after)) <= fields


def test_the_yaml_on_the_page_is_yaml():
    for text in re.findall(r"```yaml\n(.*?)\n```", PAGE, re.S):
        assert yaml.safe_load(text)

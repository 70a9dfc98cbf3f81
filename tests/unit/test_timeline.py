"""`autoteardown timeline`: from reports to a page and to a trace."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sample_reports as sample
from browser import look, needs_chromium
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autoteardown.cli import timeline
from autoteardown.timeline import drawing, page, perfetto, picture, reports
from autoteardown.timeline import summary as summaries
from autoteardown.timeline.stops import Phase, Rank, Stop, verdict

HOSTILE = """</title></script></pre><script>alert(1)</script>"'><img src=x onerror=alert(2)>&lt;\x1b[31m\u202e\x00"""


def draw(folder: Path, *args: str) -> tuple[int, Path]:
    """Run the command on a folder."""
    parser = argparse.ArgumentParser()
    timeline.configure(parser)
    out = folder.parent / "out.html"
    return timeline.run(parser.parse_args([str(folder), "-o", str(out), *args])), out


def stop_of(tmp_path: Path, values: list[dict[str, Any]]) -> Stop:
    """The one stop of these reports."""
    (stop,), _ = reports.read(sample.write(tmp_path / "reports", values))
    return stop


def svg(stop: Stop, grace: float = 25.0) -> ElementTree.Element:
    """The drawing as a tree: it is well-formed XML, or this raises."""
    return ElementTree.fromstring(drawing.draw(stop, grace))


def lanes_of(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The groups that are lanes."""
    return [g for g in root.iter("g") if g.get("class") == "lane"]


class Text(HTMLParser):
    """The text of a page by element, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.summaries: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append((tag, dict(attrs)))
        self._in.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if self._in:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        """Keep the summaries."""
        if self._in and "summary" in self._in[-1].split():
            self.summaries.append(data)


@pytest.mark.parametrize("world", [1, 4, 12])
def test_a_lane_a_rank_and_a_bar_a_phase(tmp_path: Path, world: int) -> None:
    root = svg(stop_of(tmp_path, sample.job(world)))
    found = lanes_of(root)
    assert len(found) == world
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    bottom = 0.0
    for rank, lane in enumerate(found):
        title = lane.findtext("title") or ""
        assert title.startswith(f"rank {rank} of {world} on node-{rank // 8:03}, pid ")
        bars = [r for r in lane.iter("rect") if r.attrib["class"].startswith("p-")]
        drawn = {b.attrib["class"][2:] for b in bars}
        assert drawn == {"step", "park", "drain", "quiet", "destroy", "exit"}
        for bar in bars:
            x, y, w, h = (float(bar.attrib[k]) for k in ("x", "y", "width", "height"))
            assert x >= drawing.X0 and x + w <= drawing.X1 + 2 and w >= 1.5 and h >= 3
            assert y >= bottom, "lanes overlap"
        bottom = max(float(b.attrib["y"]) + float(b.attrib["height"]) for b in bars)
    assert bottom < height and width == drawing.WIDTH


def told(lane: Any) -> str:
    """The words at both ends of a lane."""
    return " | ".join(
        text.text or "" for text in lane.findall("text") if "in" not in str(text.get("class")).split()
    )


@pytest.mark.parametrize("world", [128, 512, 2048])
def test_ranks_with_the_same_story_share_a_lane(tmp_path: Path, world: int) -> None:
    """A reader need not scroll to the one that is not like the others: it is first."""
    values = sample.job(world, {world // 2 + 1: sample.wedged, 17: sample.forced})
    stop = stop_of(tmp_path, [value for value in values if value["rank"] not in (40, 41)])
    found = [told(lane) for lane in lanes_of(svg(stop))]
    hosts = world // 8
    assert found == [
        "2 ranks | no report",
        "rank 17 | node-002 | \N{BLACK SQUARE} forced, exit 143",
        f"rank {world // 2 + 1} | node-{(world // 2 + 1) // 8:03} | \N{BLACK UP-POINTING TRIANGLE} aborted, exit 143",
        "rank 0 | node-000 | \N{CHECK MARK} clean, exit 0",
        f"{world - 5} ranks | {hosts} hosts | \N{CHECK MARK} clean, exit 143",
    ]
    title = lanes_of(svg(stop))[-1].findtext("title") or ""
    assert title.startswith(
        f"ranks 1-16, 18-39, 42-{world // 2}, {world // 2 + 2}-{world - 1} ({hosts} hosts), all alike"
    )


def test_very_many_different_stories_are_told_by_outcome(tmp_path: Path) -> None:
    odd = {n: (lambda r, w: sample.wedged(r, w, steps={"stopped_at": r})) for n in range(60)}
    stop = stop_of(tmp_path, sample.job(128, odd))
    assert len(summaries.lanes(stop)) <= summaries.MOST_LANES


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            sample.job(4),
            "Rank 0 on node-000 got SIGTERM. All 4 ranks stopped after step 1201 and left cleanly, ready to exit after "
            "328 ms; the last exited after 573 ms.",
        ),
        (
            sample.job(4, {2: sample.wedged}),
            "Rank 0 on node-000 got SIGTERM. Rank 2 on node-000 was stuck in all_reduce, at /app/train.py:61: it could "
            "not be stopped, and was aborted (blocked in all_reduce), 13.65 s after its signal. The other 3 ranks "
            "stopped after step 1201 and left cleanly, ready to exit after 328 ms, and waited for the rest until "
            "13.55 s.",
        ),
        (
            sample.job(2, {1: sample.forced}),
            "Rank 0 on node-000 got SIGTERM. Rank 1 on node-000 was stuck in all_reduce, at /app/train.py:61: it was "
            "still stuck at the hard deadline, which ended it (blocked in all_reduce), 24.00 s after its signal. Rank "
            "0 on node-000 stopped after step 1201 and left cleanly, ready to exit after 328 ms, and waited for the "
            "rest until 23.90 s.",
        ),
        (
            [sample.report(0, 2), sample.report(1, 2, outcome="partial", why="quiet timed out")],
            "Rank 0 on node-000 got SIGTERM. Rank 1 on node-000 got out in time, but not cleanly (quiet timed out), "
            "553 ms after its signal. Rank 0 on node-000 stopped after step 1201 and left cleanly, ready to exit after "
            "328 ms; the last exited after 558 ms.",
        ),
        (
            [sample.report(0, 3), sample.report(1, 3)],
            "Rank 0 on node-000 got SIGTERM. Rank 2 left no report: it was killed, or not armed. The other 2 ranks "
            "stopped after step 1201 and left cleanly, ready to exit after 328 ms; the last exited after 558 ms.",
        ),
        (
            [sample.report(0, 2, cause="lost", signal=None, origin={"rank": 1, "host": "node-7", "pid": 1})],
            "Rank 1 on node-7 vanished. Rank 1 left no report: it was killed, or not armed. Rank 0 on "
            "node-000 stopped after step 1201 and left cleanly, ready to exit after 328 ms; the last exited after "
            "549 ms.",
        ),
        (
            [
                sample.report(0, 3),
                sample.report(1, 3),
                sample.report(2, 3, phases=sample.phases(("step", 4.0, "ok", ""), ("exit", 0.1, "ok", ""))),
            ],
            "Rank 0 on node-000 got SIGTERM. All 3 ranks stopped after step 1201 and left cleanly, ready to exit after "
            "4.00 s: most after 328 ms, then they waited for rank 2 on node-000.",
        ),
    ],
    ids=["clean", "wedged", "forced", "partial", "missing", "lost", "slow"],
)
def test_the_sentence_names_who_held_it_up(
    tmp_path: Path, values: list[dict[str, Any]], words: str, capsys: Any
) -> None:
    _, out = draw(sample.write(tmp_path / "reports", values))
    assert summaries.sentence(reports.read(tmp_path / "reports")[0][0]) == words
    assert f'<p class="story">{page.esc(words)}</p>' in out.read_text("utf-8")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        (
            sample.job(4),
            "4 ranks: 4 clean; all stopped at step 1201; 573 ms from the first signal to the last exit, of 25 s "
            "grace; exit codes 0 (x1), 143 (x3)",
        ),
        (
            sample.job(4, {2: sample.wedged}),
            "4 ranks: 3 clean, 1 aborted; 3 of 4 stopped at step 1201; 13.67 s from the first signal to the last "
            "exit, of 25 s grace; exit codes 0 (x1), 143 (x3)",
        ),
        (
            sample.job(2, {1: sample.forced}),
            "2 ranks: 1 clean, 1 forced; 1 of 2 stopped at step 1201; 24.01 s from the first signal to the last "
            "exit, of 25 s grace; exit codes 0 (x1), 143 (x1)",
        ),
        (
            [
                sample.report(0, 3, steps={"stopped_at": 7}),
                sample.report(1, 3, steps={"at_signal": 8, "stopped_at": 8}),
            ],
            "2 ranks: 2 clean; stopped at different steps: 7 (x1), 8 (x1); 558 ms from the first signal to the last "
            "exit, of 25 s grace; exit codes 0 (x1), 143 (x1); no report from rank 2",
        ),
        (
            [sample.report(0, 1, steps=None, phases=[])],
            "1 rank: 1 clean; no step to stop at; 0 ms from the first signal to the last exit, of 25 s grace; "
            "exit codes 0 (x1)",
        ),
    ],
    ids=["clean", "wedged", "forced", "steps-differ", "never-stepped"],
)
def test_the_summary(tmp_path: Path, values: list[dict[str, Any]], summary: str, capsys: Any) -> None:
    code, out = draw(sample.write(tmp_path / "reports", values))
    assert code == 0
    assert summary in Text(out.read_text("utf-8")).summaries[0]
    assert summary in capsys.readouterr().out


def test_ranks_lie_on_one_clock(tmp_path: Path) -> None:
    """A phase is drawn at its rank's signal plus its own seconds, in whatever zone the report tells the time."""
    late = (sample.T0 + timedelta(seconds=2)).isoformat().replace("+00:00", "Z")
    there = (sample.T0 + timedelta(seconds=4)).astimezone(sample.timezone(timedelta(hours=9))).isoformat()
    drain = sample.phases(("drain", 1.0, "ok", ""))
    stop = stop_of(
        tmp_path,
        [
            sample.report(r, 3, received_at=t, phases=drain)
            for r, t in enumerate([sample.T0.isoformat(), late, there])
        ],
    )
    assert [stop.offset(r) for r in stop.ranks] == [0.0, 2.0, 4.0]
    assert stop.lasted == 5.0
    starts = [float(b.attrib["x"]) for b in svg(stop).iter("rect") if b.attrib["class"] == "p-drain"]
    first, second = starts[1] - starts[0], starts[2] - starts[1]
    assert first == pytest.approx(second, abs=0.2) and first > 100


def test_a_signal_and_the_word_of_a_peer_look_different(tmp_path: Path) -> None:
    stop = stop_of(tmp_path, sample.job(3))
    first, *others = lanes_of(svg(stop))
    assert [e.get("class") for e in first.iter("path")] == ["signal"] and not list(first.iter("circle"))
    for lane in others:
        assert [e.get("class") for e in lane.iter("circle")] == ["peer"] and not list(lane.iter("path"))
    assert "got SIGTERM, 0 ms after the first signal" in (first.findtext("title") or "")
    assert "stopped because of a peer: rank 0 on node-000" in (others[0].findtext("title") or "")


@pytest.mark.parametrize(("world", "odd"), [(8, 5), (512, 301)])
def test_a_wedged_rank_stands_out_and_tells_its_stacks(tmp_path: Path, world: int, odd: int) -> None:
    stop = stop_of(tmp_path, sample.job(world, {odd: sample.wedged}))
    first, *others = lanes_of(svg(stop))
    title = first.findtext("title") or ""
    assert title.startswith(f"rank {odd} of {world}") and "aborted, exit 143, out after 13.65 s" in title
    assert "when after park, thread 140189\n  " in title and "/app/train.py:61 in main" in title
    assert "why: blocked in all_reduce" in title
    assert [r.attrib["class"] for r in first.iter("rect")].count("timeout") == 2
    assert "aborted, exit 143" in told(first)  # in words, not by colour alone
    assert first.get("tabindex") == "0" and others[0].get("tabindex") is None
    _, out = draw(tmp_path / "reports")
    text = out.read_text("utf-8")
    assert (
        text.count("/app/train.py:61") == 5
    )  # the sentence; two stacks, in the lane's title and in the table


def test_ranks_that_cannot_be_told_apart_are_no_trouble() -> None:
    """Neither by their time nor by their number, which a report may lack."""
    same = [Rank("a", outcome="clean"), Rank("b", outcome="clean")]
    assert "All 2 ranks stopped and left cleanly" in summaries.sentence(Stop(same))
    assert len(summaries.lanes(Stop(same * 10))) == 1


@pytest.mark.parametrize(
    ("stuck", "where"),
    [
        ([{"frames": sample.FRAMES}], "all_reduce, at /app/train.py:61"),
        ([{"frames": ["/app/train.py:9 in loop"]}], "/app/train.py:9 in loop"),
        ([{"frames": sample.FRAMES[:1]}], ""),
        ([{"frames": [None, 7]}, "x", {}], ""),
        ("all_reduce", ""),
        (None, ""),
    ],
)
def test_where_a_rank_was_stuck(stuck: Any, where: str) -> None:
    assert reports.stuck_at(stuck) == where


def test_the_stacks_of_the_agent(tmp_path: Path) -> None:
    """Whatever shape `stuck` has, its words get onto the page, and an endless one is cut."""
    frames = ["/app/train.py:61 in main", "/app/train.py:88 in <module>"]
    stuck = [{"at": 8.0, "stacks": [{"thread": 1234, "frames": frames}]}]
    assert reports.stacks(stuck).split("\n") == ["at 8.0", "  thread 1234", *("    " + f for f in frames)]
    assert reports.stacks({"at_signal": "a\nb"}) == "  a\n  b"
    assert reports.stacks(None) == reports.stacks([]) == ""
    assert len(reports.stacks([["x" * 300] * 50] * 50)) < 21_000


def test_the_grace_period_is_to_scale_or_broken_off(tmp_path: Path) -> None:
    near, far = drawing.axis(20.0, 25.0), drawing.axis(0.5, 25.0)
    assert not near.broken and near.x(25.0) == near.limit
    assert far.broken and far.x(0.5) < far.right < far.limit
    # The process overran it: the mark lies inside.
    over = drawing.axis(40.0, 25.0)
    assert not over.broken and over.x(25.0) == over.limit < over.x(40.0)
    root = svg(stop_of(tmp_path, sample.job(2)), grace=30)
    assert "grace period ends: 30 s" in [t.text for t in root.iter("text")]


@given(st.floats(0, 1e5), st.floats(0.001, 1e5))
def test_the_axis_keeps_its_order(lasted: float, grace: float) -> None:
    axis = drawing.axis(lasted, grace)
    at = [axis.x(lasted * i / 10) for i in range(11)]
    assert at == sorted(at) and at[0] == drawing.X0 and at[-1] <= axis.right <= drawing.X1
    assert drawing.X0 <= axis.limit <= drawing.X1


@given(st.floats(0, 1e4), st.floats(0.1, 1e4))
@example(lasted=24.9, grace=25.0)
@example(lasted=25.1, grace=25.0)
@example(lasted=3000.0, grace=1.0)
@settings(deadline=None)
def test_the_words_of_the_marks_keep_clear_of_each_other(lasted: float, grace: float) -> None:
    stop = Stop([Rank("", received=1.0, phases=[Phase("step", 0.0, lasted, "ok", "")])])
    spans = []
    for text in svg(stop, grace).iter("text"):
        if re.match("first signal|last exit|grace period ends", text.text or ""):
            x, wide = float(text.attrib["x"]), drawing.WIDEST * len(text.text or "")
            spans.append((x - wide, x) if text.get("text-anchor") == "end" else (x, x + wide))
    spans.sort()
    assert len(spans) == 3 and spans[0][0] > 0 and spans[-1][1] < drawing.WIDTH
    assert all(before[1] < after[0] for before, after in zip(spans, spans[1:])), spans


def test_the_grace_period_comes_from_the_option_then_the_reports(tmp_path: Path) -> None:
    folder = sample.write(
        tmp_path / "reports", [sample.report(0, 2, grace=110), sample.report(1, 2, grace=120)]
    )
    _, out = draw(folder)
    assert "of 110 s grace" in out.read_text("utf-8") and "is assumed" not in out.read_text("utf-8")
    _, out = draw(folder, "--grace", "30")
    assert "of 30 s grace" in out.read_text("utf-8")
    _, out = draw(sample.write(tmp_path / "silent", [sample.report(rank, 2, grace=None) for rank in (0, 1)]))
    assert "of 25 s grace" in out.read_text("utf-8") and "is assumed" in out.read_text("utf-8")


def broken_reports(folder: Path) -> dict[str, str]:
    """Put files in a folder that are no reports; the words that each is told by."""
    files = {
        "cut.json": ('{"schema": 1, "host": "a', "not JSON"),
        "empty.json": ("", "not JSON"),
        "future.json": ('{"schema": 3}', "schema 3"),
        "list.json": ("[]", "not a report"),
        "other.json": ('{"loss": 0.1}', "not a report"),
        "true.json": ('{"schema": true}', "schema True"),
        "nan.json": ('{"schema": 1, "host": "b", "x": NaN}', "NaN is not a number"),
        "deep.json": ("[" * 200_000, "recursion"),
        "huge.json": ('"' + "x" * (reports.MAX_BYTES + 1) + '"', "larger than 4 MiB"),
        "digits.json": ('{"schema": 1, "pid": ' + "9" * 5000 + "}", "digits"),
    }
    for name, (text, _) in files.items():
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes(b'{"schema": 1, "host": "\xe9"}')
    os.mkfifo(folder / "fifo.json")
    (folder / "folder.json").mkdir()
    (folder / "gone.json").symlink_to("nowhere")
    words = {name: text for name, (_, text) in files.items()}
    return {
        **words,
        "latin.json": "not UTF-8",
        "fifo.json": "not a regular file",
        "folder.json": "not a regular file",
        "gone.json": "not a regular file",
    }


def test_what_cannot_be_read_is_named_and_the_rest_is_drawn(tmp_path: Path, capsys: Any) -> None:
    folder = sample.write(tmp_path / "reports", sample.job(4))
    words = broken_reports(folder)
    (folder / "half-written.json.77.tmp").write_text("{")
    code, out = draw(folder)
    text = out.read_text("utf-8")
    assert code == 0 and text.count('<g class="lane"') == 4
    told = capsys.readouterr().err.splitlines()
    for name, word in words.items():
        (line,) = [line for line in told if f" {name}: " in line]
        assert line.startswith(f"autoteardown timeline: {name}: left out: ") and word in line
        assert page.esc(line.split(": ", 1)[1]) in text
    assert len(told) == len(words)


def test_reports_of_the_first_version_are_read(tmp_path: Path, capsys: Any) -> None:
    first = sample.report(0, 2, schema=1)
    del first["job"]
    code, _ = draw(sample.write(tmp_path / "reports", [first, sample.report(1, 2)]))
    assert (code, capsys.readouterr().err) == (0, "")


def test_a_report_with_parts_missing_is_drawn_with_what_it_has(tmp_path: Path, capsys: Any) -> None:
    whole, partial = sample.report(0, 2), sample.report(1, 2)
    for name in ("received_at", "exit_code", "steps", "stuck"):
        del partial[name]
    partial["phases"] = [
        {"name": "step", "start": 0.0, "end": 0.2, "outcome": "ok"},
        {"name": "drain", "start": 0.2, "end": None, "outcome": "ok", "detail": None},
        {"name": "exit", "start": 5, "end": 1, "outcome": "ok"},
        {"name": "exit", "start": "soon"},
        "exit",
    ]
    stop = stop_of(tmp_path, [whole, partial])
    _, second = lanes_of(svg(stop))
    assert [r.attrib["class"] for r in second.iter("rect")] == ["hit", "p-drain open", "p-step"]
    assert "0.200-... s  drain" in (second.findtext("title") or "")
    draw(tmp_path / "reports")
    assert (
        "node-000-4001.json: drawn without received_at, exit_code, 3 of its phases" in capsys.readouterr().err
    )


@pytest.mark.parametrize("what", ["empty", "bad", "missing", "file"])
def test_nothing_to_draw_is_an_error(tmp_path: Path, what: str, capsys: Any) -> None:
    folder = tmp_path / "reports"
    if what == "file":
        folder.write_text("")
    elif what != "missing":
        folder.mkdir()
    if what == "bad":
        broken_reports(folder)
    code, out = draw(folder)
    last = capsys.readouterr().err.splitlines()[-1]
    words = {"empty": "no reports; ranks write them", "bad": "none of the reports can be read"}
    assert code == 1 and not out.exists()
    assert words.get(what, "not a folder") in last and str(folder) in last


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        ("clean", 0, "\N{CHECK MARK} clean, exit 0"),
        ("forced", None, "\N{BLACK SQUARE} forced"),
        ("paused", 3, "\N{EN DASH} paused, exit 3"),
        ("died of SIGKILL", -9, "\N{EN DASH} died of SIGKILL"),
    ],
)
def test_the_verdict_on_a_rank(outcome: str, code: int | None, words: str) -> None:
    assert verdict(Rank("", outcome=outcome, exit_code=code)) == words


def test_ranks_without_a_report(tmp_path: Path, capsys: Any) -> None:
    values = [value for value in sample.job(16) if value["rank"] not in (3, 4, 9)]
    code, _ = draw(sample.write(tmp_path / "most", values))
    assert code == 0 and "no report from ranks 3-4, 9" in capsys.readouterr().err
    root = svg(reports.read(tmp_path / "most")[0][0])
    assert next(g.findtext("title") for g in lanes_of(root)) == "ranks 3-4, 9: no report"
    # One node's folder of a big job: naming the rest is enough.
    (stop,), problems = reports.read(sample.write(tmp_path / "few", sample.job(512)[:8]))
    assert len(lanes_of(svg(stop))) == 8
    assert problems == ["no report from ranks 8-511: killed, not armed, or not in this folder"]


def later(value: dict[str, Any], seconds: float, pid: int) -> dict[str, Any]:
    """The same report from another attempt."""
    when = sample.datetime.fromisoformat(value["received_at"]) + timedelta(seconds=seconds)
    origin = {**value["origin"], "pid": value["origin"]["pid"] + pid}
    return {**value, "received_at": when.isoformat(), "pid": value["pid"] + pid, "origin": origin}


def shapes(folder: Path) -> list[tuple[list[int | None], set[int]]]:
    """The ranks of each stop, and the thousands of their process ids."""
    return [
        ([r.rank for r in s.ranks], {(r.pid or 0) // 1000 for r in s.ranks}) for s in reports.read(folder)[0]
    ]


def test_restarts_are_stops_of_their_own(tmp_path: Path) -> None:
    values = (
        sample.job(4)
        + [later(v, 3600, 1000) for v in sample.job(4)]
        + [later(sample.report(2, 4), 9000, 2000)]
    )
    folder = sample.write(tmp_path / "reports", values)
    assert shapes(folder) == [([0, 1, 2, 3], {4}), ([0, 1, 2, 3], {5}), ([2], {6})]
    text = timeline.html(*reports.read(folder), None, "x")
    assert text.count('role="img"') == 3 and "Stop 2 of 3" in text and "2026-03-05 15:07:31 UTC" in text


def test_the_same_pids_after_a_restart_are_another_stop(tmp_path: Path) -> None:
    """In a container the program is often process 1, and the pod's name is the same."""
    sample.write(tmp_path / "reports", sample.job(2)[:1])
    sample.write(tmp_path / "reports", [later(v, 3600, 0) for v in sample.job(2)[1:]], prefix="second-")
    assert [ranks for ranks, _ in shapes(tmp_path / "reports")] == [[0], [1]]


def test_two_jobs_at_once_are_told_apart_by_their_origin(tmp_path: Path) -> None:
    values = []
    for a, b in zip(sample.job(4), sample.job(4)[::-1]):
        values += [a, later(b, 0.001, 1000)]
    assert shapes(sample.write(tmp_path / "reports", values)) == [([0, 1, 2, 3], {4}), ([0, 1, 2, 3], {5})]


def test_ranks_that_do_not_know_of_each_other_are_one_stop(tmp_path: Path) -> None:
    """AUTOTEARDOWN_PEERS=off: each names itself as the origin. A rank in its rendezvous may not know the world."""
    values = [
        later({**v, "origin": {"host": v["host"], "pid": v["pid"]}}, 0.3 * v["rank"], 0)
        for v in sample.job(4)
    ]
    values[2]["world_size"] = None
    assert shapes(sample.write(tmp_path / "reports", values)) == [([0, 1, 2, 3], {4})]


def test_text_of_reports_stays_text(tmp_path: Path, capsys: Any) -> None:
    value = sample.wedged(0, 2)
    evil = dict.fromkeys(("host", "program", "cause", "outcome", "signal", "stuck", "exit_code"), HOSTILE)
    value["phases"][0].update(name=HOSTILE, outcome=HOSTILE, detail=HOSTILE)
    value["origin"] = {"rank": HOSTILE, "host": HOSTILE, "pid": HOSTILE}
    folder = sample.write(tmp_path / "reports", [{**value, **evil}, sample.report(1, 2)])
    (folder / "\x1b]0;evil\x07<b>.json").write_text("{")
    code, out = draw(folder)
    assert code == 0
    text = out.read_text("utf-8")
    tags = [tag for tag, _ in Text(text).tags]
    assert tags.count("script") == 1 and "img" not in tags and "b" not in tags[: tags.index("ul")][:-1]
    assert not [name for _, attrs in Text(text).tags for name in attrs if name.startswith("on")]
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    told = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in told.err + told.out)
    assert "&lt;script&gt;alert(1)" in text


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    _, out = draw(sample.write(tmp_path / "reports", sample.job(8, {3: sample.wedged})))
    text = out.read_text("utf-8")
    for _, attrs in Text(text).tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attrs)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#timeout", "#error", "#gone"}
    assert "@import" not in text and "://" not in text
    # The policy lets the page's own script run, and no other.
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Text(text).tags if t == "meta" and "http-equiv" in a)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Contrast ratio as WCAG defines it."""
    dark, arm = sorted((luminance(a), luminance(b)))
    return (arm + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_can_be_told_from_the_page_and_read(scheme: str) -> None:
    paper = page.PAPER[scheme]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name, colour in page.PHASES[scheme].items():
        assert contrast(colour, paper) >= 4.5, (
            name
        )  # the phase's name is written in the bar in the page's colour
    for words in (page.INK, page.SOFT, page.BAD):
        assert contrast(words[scheme], paper) >= 4.5


# What a dichromat sees of linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
DICHROMATS = {
    "nobody": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Phases that follow each other in a lane.
NEIGHBOURS = (
    "yield-step step-park park-drain park-abort drain-quiet drain-abort abort-quiet quiet-destroy quiet-exit"
)


def lab(colour: str, seen: list[list[float]]) -> tuple[float, float, float]:
    """A colour in CIELAB, as it is seen."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    r, g, b = (min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear)))) for row in seen)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", DICHROMATS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_neighbours_can_be_told_apart_by_everybody(scheme: str, eyes: str) -> None:
    colours = page.PHASES[scheme]
    for pair in [*NEIGHBOURS.split(), "destroy-exit", "abort-exit"]:
        one, other = (lab(colours[name], DICHROMATS[eyes]) for name in pair.split("-"))
        assert math.dist(one, other) > 12, pair


@pytest.mark.parametrize("phase", ["yield", "step", "park", "drain", "quiet", "destroy", "abort", "exit"])
def test_every_phase_of_the_contract_has_a_colour(tmp_path: Path, phase: str) -> None:
    stop = stop_of(tmp_path, [sample.report(0, 1, phases=sample.phases((phase, 1.0, "ok", "")))])
    assert [r.attrib["class"] for r in svg(stop).iter("rect")].count(f"p-{phase}") == 1
    assert phase in picture.key(stop)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=8), s, max_size=4)
)
some_phase = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["step", "exit", "?"]) | anything,
        "start": st.floats(0, 30) | anything,
        "end": st.floats(0, 30) | anything,
        "outcome": st.sampled_from(["ok", "timeout", "error", "skipped"]) | anything,
        "detail": anything,
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_report_breaks_the_reader_or_the_page(tmp_path: Path, data: st.DataObject) -> None:
    values = [sample.report(rank, 3) for rank in range(3)]
    for value in values:
        for name in data.draw(st.lists(st.sampled_from([k for k in value if k != "schema"]), max_size=4)):
            value[name] = data.draw(anything)
        if data.draw(st.booleans()):
            value["phases"] = data.draw(st.lists(some_phase, max_size=5))
    for number, value in enumerate(values):
        (tmp_path / f"{number}.json").write_text(json.dumps(value))
    stops, problems = reports.read(tmp_path)
    for stop in stops:
        svg(stop)
        picture.key(stop)
    if stops:
        text = timeline.html(stops, problems, None, "x")
        assert text.count('<g class="lane" data-outcome') == sum(len(s.ranks) for s in stops)
        check_trace(perfetto.trace(stops, None))


def check_trace(text: str) -> list[dict[str, Any]]:
    """What the trace viewer asks of a trace: names for all, slices that nest, flows with two ends."""
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    named = {(e["name"], e["pid"], e["tid"]) for e in events if e["ph"] == "M"}
    open_until: dict[tuple[int, int], list[int]] = {}
    for e in events:
        assert isinstance(e["pid"], int) and isinstance(e["tid"], int) and e["pid"] != e["tid"]
        if e["ph"] == "M":
            continue
        assert isinstance(e["ts"], int) and e["ts"] >= 0
        assert ("process_name", e["pid"], 0) in named and ("thread_name", e["pid"], e["tid"]) in named
        if e["ph"] == "X":
            stack = open_until.setdefault((e["pid"], e["tid"]), [])
            while stack and stack[-1] <= e["ts"] and len(stack) > 1:
                stack.pop()
            assert e["dur"] >= 0 and (not stack or e["ts"] + e["dur"] <= stack[-1])
            stack.append(e["ts"] + e["dur"])
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    slices = {(e["pid"], e["tid"]): (e["ts"], e["ts"] + e["dur"]) for e in reversed(events) if e["ph"] == "X"}
    for key, start in starts.items():
        assert start["ts"] <= ends[key]["ts"] and ends[key]["bp"] == "e"
        for flow in (start, ends[key]):
            begin, end = slices[flow["pid"], flow["tid"]]
            assert begin <= flow["ts"] <= end
    return events


def test_the_trace_for_perfetto(tmp_path: Path) -> None:
    folder = sample.write(tmp_path / "reports", sample.job(16, {9: sample.wedged}))
    code, out = draw(folder, "--format", "perfetto", "--grace", "30")
    assert code == 0
    events = check_trace(out.read_text("utf-8"))
    names = [(e["name"], e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")]
    assert [n for k, n in names if k == "process_name"] == ["node-000", "node-001"]
    assert ("thread_name", "rank 9 (pid 4001)") in names and len(names) == 2 + 16
    (odd,) = [e for e in events if e["ph"] == "X" and e["name"] == "aborted, exit 143"]
    assert odd["dur"] == 13_650_000 and "/app/train.py:61" in odd["args"]["stuck"]
    own = [e for e in events if e["ph"] == "X" and e["tid"] == odd["tid"]]
    names = [e["name"] for e in own]
    assert names == ["aborted, exit 143", "step (timeout)", "park (timeout)", "abort", "quiet", "exit"]
    assert [e["dur"] for e in own[1:3]] == [8_000_000, 5_000_000]
    assert len([e for e in events if e["ph"] == "s"]) == 15
    assert [e["name"] for e in events if e["ph"] == "i" and e["s"] == "t"].count("SIGTERM") == 1
    assert [e["ts"] for e in events if e["name"] == "grace period ends (30 s)"] == [30_000_000]


def test_attempts_lie_on_top_of_each_other_in_the_trace(tmp_path: Path) -> None:
    values = sample.job(2) + [later(v, 3600, 1000) for v in sample.job(2)]
    stops, _ = reports.read(sample.write(tmp_path / "reports", values))
    events = check_trace(perfetto.trace(stops, None))
    hosts = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert hosts == ["node-000 (stop 1)", "node-000 (stop 2)"]
    assert max(e.get("ts", 0) for e in events if e["ph"] == "X") < 1_000_000


def test_no_arrow_of_the_trace_goes_back_in_time(tmp_path: Path) -> None:
    """The clock of a peer's host may be behind: it heard, so it says, before the signal."""
    behind = [(sample.T0 - timedelta(seconds=s)).isoformat() for s in (0.1, 5)]
    values = [sample.report(0, 3), *(sample.report(n + 1, 3, received_at=t) for n, t in enumerate(behind))]
    events = check_trace(perfetto.trace([stop_of(tmp_path, values)], None))
    flows = {e["ph"]: e["ts"] for e in events if e["ph"] in "sf"}
    assert flows == {"s": 5_000_000, "f": 5_000_000}  # and none to the one that was gone before the signal


def test_the_picture_alone(tmp_path: Path) -> None:
    """For a README: one SVG file with its own colours and background, all stops in it, the hostile one too."""
    values = sample.job(4, {2: sample.wedged}) + [later(v, 3600, 1000) for v in sample.job(2)]
    values.append(sample.report(0, 1, host=HOSTILE, program=HOSTILE))
    code, out = draw(sample.write(tmp_path / "reports", values), "--format", "svg")
    assert code == 0
    root = ElementTree.fromstring(out.read_text("utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert {e.tag for e in root.iter()} <= {
        space + name
        for name in (
            "svg",
            "style",
            "defs",
            "pattern",
            "rect",
            "path",
            "g",
            "title",
            "text",
            "line",
            "circle",
        )
    }
    drawings = [e for e in root.iter(f"{space}svg") if e.get("role") == "img"]
    assert [len([g for g in d.iter(f"{space}g") if g.get("class") == "lane"]) for d in drawings] == [1, 4, 2]
    ends = [float(d.attrib["y"]) + float(d.attrib["height"]) for d in drawings]
    assert ends == sorted(ends) and ends[-1] <= float(root.attrib["height"])
    assert [float(d.attrib["y"]) > end for d, end in zip(drawings[1:], ends)] == [True, True]
    texts = [e.text or "" for e in root.iter(f"{space}text")]
    assert any("2 ranks: 2 clean" in t for t in texts) and "timed out" in texts


def test_output(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sample.write(tmp_path / "reports", sample.job(2))
    parser = argparse.ArgumentParser()
    timeline.configure(parser)
    assert timeline.run(parser.parse_args([str(folder), "-o", "-"])) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    monkeypatch.chdir(
        folder
    )  # the default output beside its input: the next run must not read it as a report
    assert timeline.run(parser.parse_args(["."])) == 0
    assert timeline.run(parser.parse_args([".", "--format", "perfetto"])) == 0
    assert {"timeline.html", "timeline.perfetto.json"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob(".*"))
    capsys.readouterr()
    assert timeline.run(parser.parse_args(["."])) == 0
    assert capsys.readouterr().err == ""
    assert timeline.run(parser.parse_args([".", "-o", "no/such/folder/x.html"])) == 1
    assert (
        capsys.readouterr().err == "autoteardown timeline: no/such/folder/x.html: No such file or directory\n"
    )
    assert timeline.run(parser.parse_args([".", "-o", "/dev/null"])) == 0 and not Path("/dev/null").is_file()
    for bad in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            parser.parse_args([".", "--grace", bad])


def test_the_command(tmp_path: Path) -> None:
    """From the shell, and without torch: reports are looked at on a laptop."""
    folder = sample.write(tmp_path / "reports", sample.job(2))
    out = tmp_path / "page.html"
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "autoteardown", "timeline", str(folder), "-o", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks: 2 clean" in result.stdout and f"wrote {out}" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "argparse" in imported and not {"torch", "wrapt", "numpy"} & imported


# What a browser made of a page: how many lanes, whether any words lie outside the drawing or over each other, and
# what hovering over a lane shows.
PROBE = """
const lanes=[...document.querySelectorAll("g.lane")],box=document.querySelector("svg[viewBox]").getBoundingClientRect();
const texts=[...document.querySelectorAll("svg[viewBox] text")].map(t=>({b:t.getBoundingClientRect(),t:t.textContent}));
const outside=texts.filter(({b})=>b.left<box.left-1||b.right>box.right+1||b.top<box.top-1||b.bottom>box.bottom+1);
const lap=[];
texts.forEach((a,i)=>texts.slice(i+1).forEach(c=>{if(a.b.left<c.b.right-1&&c.b.left<a.b.right-1&&
 Math.min(a.b.bottom,c.b.bottom)-Math.max(a.b.top,c.b.top)>a.b.height*.45)lap.push(a.t+" / "+c.t)}));
const tip=document.getElementById("tip"),before=tip.hidden;
const lane=document.querySelector("g.lane[tabindex]")||lanes[0];
lane.scrollIntoView({block:"center"});const at=lane.getBoundingClientRect();
lane.dispatchEvent(new MouseEvent("mousemove",{clientX:at.left+200,clientY:at.top+2}));
const shown=tip.hidden?null:tip.textContent,where=tip.getBoundingClientRect();
lane.dispatchEvent(new MouseEvent("mouseleave"));
return {lanes:lanes.length,titles:document.querySelectorAll("g.lane title").length,
 named:lanes.filter(l=>l.getAttribute("aria-label")).length,outside:outside.map(o=>o.t),lap,before,shown,after:tip.hidden,
 inView:where.left>=0&&where.top>=0&&where.right<=innerWidth&&where.bottom<=innerHeight,
 paper:getComputedStyle(document.body).backgroundColor,
 wide:document.documentElement.scrollWidth<=innerWidth,
 bars:new Set([...document.querySelectorAll("g.lane rect[class^=p-]")].map(b=>getComputedStyle(b).fill)).size}
"""


@needs_chromium
@pytest.mark.parametrize(
    ("world", "odd", "dark"),
    [
        (1, {}, False),
        (8, {3: sample.wedged}, True),
        (64, {17: sample.forced}, False),
        (512, {300: sample.wedged}, True),
    ],
)
def test_in_a_browser(tmp_path: Path, world: int, odd: dict[int, Any], dark: bool) -> None:
    _, out = draw(sample.write(tmp_path / "reports", sample.job(world, odd)))
    seen, console = look(out, PROBE, tmp_path / "browser", dark)
    assert console == []
    assert seen["lanes"] == seen["named"] == (world if world <= summaries.FEW else 3)
    assert seen["titles"] == 0, "the browser's own tooltip would lie over ours"
    assert seen["outside"] == [] and seen["lap"] == []
    assert seen["before"] is True and seen["after"] is True and seen["inView"] is True
    assert ("/app/train.py:61" if odd else "rank 0 of 1") in seen["shown"]
    assert seen["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert seen["wide"] is True, "the page itself scrolls sideways"
    assert seen["bars"] >= 6, "phases have colours of their own"


@needs_chromium
def test_hostile_text_in_a_browser(tmp_path: Path) -> None:
    value = sample.wedged(0, 1, host=HOSTILE, program=HOSTILE, outcome=HOSTILE, stuck=HOSTILE)
    _, out = draw(sample.write(tmp_path / "reports", [value]))
    probe = 'return [...document.querySelectorAll("script,img")].map(e=>e.outerHTML.slice(0,30))'
    seen, console = look(out, probe, tmp_path / "browser")
    assert console == [] and len(seen) == 2 and not any("alert" in tag for tag in seen)

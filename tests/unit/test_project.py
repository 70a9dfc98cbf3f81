"""What surrounds the code: metadata, workflows, the site."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SOURCE = re.search(r'^Source = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
ACTIONLINT = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")


@pytest.mark.skipif(ACTIONLINT is None, reason="no actionlint for this machine")
def test_the_workflows_are_valid() -> None:
    run = subprocess.run([ACTIONLINT, *WORKFLOWS], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.skipif(ACTIONLINT is None, reason="no actionlint for this machine")
def test_the_check_of_the_workflows_can_fail(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text("utf-8").replace("matrix.python", "matrix.pyhton"))
    run = subprocess.run([ACTIONLINT, broken], capture_output=True, text=True)
    assert run.returncode == 1 and "pyhton" in run.stdout


def test_every_python_and_both_ends_of_wrapt_are_tested() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]
    assert matrix["python"] == [f"3.{minor}" for minor in range(9, 15)]
    assert 'requires-python = ">=3.9"' in PYPROJECT
    least, below = re.search(r'"wrapt>=([\d.]+),<(\d+)"', PYPROJECT).groups()
    assert matrix["wrapt"] == [f"wrapt<{below}"]
    assert {each["wrapt"] for each in matrix["include"]} == {f"wrapt=={least}.*"}


def test_nothing_is_published_that_was_not_built_from_the_tag() -> None:
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` so
    jobs = release["jobs"]
    assert jobs["publish"]["needs"] == jobs["images"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    files = {each["file"] for each in jobs["images"]["strategy"]["matrix"]["include"]}
    assert files == {
        f"docker/{path.name}" for path in (ROOT / "docker").glob("Dockerfile*") if "ignore" not in path.name
    }


@pytest.mark.parametrize(
    "path", [*ROOT.glob(".github/ISSUE_TEMPLATE/*"), ROOT / ".pre-commit-config.yaml"], ids=str
)
def test_yaml_is_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text("utf-8"))


def test_the_readme_of_the_package_needs_no_file_beside_it() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "metadata", "readme"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    targets = re.findall(r"\]\(([^)]+)\)", run.stdout)
    raw = SOURCE.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    ours = [target for target in targets if target.startswith((f"{SOURCE}/blob/main/", raw))]
    assert len(ours) > 10 and any(target.startswith(raw) for target in ours)
    for target in ours:
        path = target.replace(raw, "").replace(f"{SOURCE}/blob/main/", "").partition("#")[0]
        assert (ROOT / path).exists(), target


def test_the_groups_that_make_installs_are_there() -> None:
    groups = set(
        re.findall(r"^(\w+) = \[", PYPROJECT.partition("[dependency-groups]")[2].partition("\n[")[0], re.M)
    )
    used = {word for line in re.findall(r"^GROUPS_\w+ := (.*)$", MAKEFILE, re.M) for word in line.split()}
    assert used == groups
    extras = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert re.findall(r"^(\w+) = ", extras, re.M) == ["drill"]


@pytest.mark.parametrize("name", ["lint", "drill"])
def test_make_brings_pip_up_to_groups_first(name: str) -> None:
    """What a fresh clone runs: `make -n` in a folder that has no environment."""
    run = subprocess.run(
        ["make", "-n", "-f", ROOT / "Makefile", "VENV=/nonexistent/venv", name],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    installs = [line for line in run.stdout.splitlines() if "pip install" in line and "--pip" not in line]
    assert "'pip>=25.1,<26'" in installs[-2] and "--group" in installs[-1], run.stdout


def test_the_site_has_every_page() -> None:
    mkdocs = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"^\s+- ([\w-]+\.md)$", mkdocs, re.M)) - {"index.md"} == pages
    assert f"repo_url: {SOURCE}\n" in mkdocs


def test_the_site_can_be_built(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere is an error."""
    pytest.importorskip("material", reason="mkdocs-material is in the group docs (make docs)")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        tmp_path / "site",
    ]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert run.returncode == 0, run.stderr
    assert "Into forty images" in (tmp_path / "site" / "cluster" / "index.html").read_text("utf-8")


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[?\d+\.\d+\.\d+\]?( - \d{4}-\d\d-\d\d)?", head) for head in heads[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds

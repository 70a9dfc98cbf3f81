"""The docs say what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
COMPATIBILITY = (DOCS / "compatibility.md").read_text()


def test_the_settings_table_is_the_codes():
    assert subprocess.run([sys.executable, DOCS / "generate.py", "--check"], check=False).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_are_named_exist(page):
    there = {path.name for path in ROOT.glob("tests/*/test_*.py")}
    for path in ROOT.glob("tests/*/test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"\btest_\w+(?:\.py)?", page.read_text()))
    assert named - there == set()


def rows():
    """The rows of the compatibility page's tables, as lists of cells, without their heads."""
    lines = [line for line in COMPATIBILITY.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line, after in zip(lines, [*lines[1:], ""])
        if not line.startswith("|--") and not after.startswith("|--")
    ]


def test_each_row_of_the_compatibility_page_names_its_test():
    assert len(rows()) > 30
    for cells in rows():
        assert re.search(r"`test_\w+(\.py)?`", cells[-1]), cells


def test_the_versions_on_the_compatibility_page_are_the_ones_installed():
    pinned = re.findall(r'^  "([\w[\]-]+)==([\w.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(pinned) > 10
    for name, version in pinned:
        assert version in COMPATIBILITY, f"{name} {version}"

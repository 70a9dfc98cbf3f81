"""The docs say what the code says."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import LOG_LINE

from autoteardown import settings

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


def anchors(page):
    """What the headings of a page are called in links."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text("utf-8")):
        assert anchor in anchors((page.parent / target) if target else page), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_are_named_exist(page):
    there = {path.name for path in ROOT.glob("tests/*/test_*.py")}
    for path in ROOT.glob("tests/*/test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"\btest_\w+(?:\.py)?", page.read_text()))
    assert named - there == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_that_are_named_exist(page):
    """`training/parking.py` is one of the package's."""
    for room, name in re.findall(r"`((?:autoteardown/)?[a-z]+/)?(\w+\.py)`", page.read_text("utf-8")):
        there = [ROOT / room / name, ROOT / "autoteardown" / room / name]
        if room or name not in {"train.py", "serve.py", "sitecustomize.py", "launch.py"}:
            there += [
                *ROOT.glob(f"tests/*/{name}"),
                *(ROOT.glob(f"autoteardown/*/{name}") if not room else ()),
            ]
            assert any(path.exists() for path in there), room + name


def test_every_world_of_tests_is_introduced():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for folder in {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}:
        assert f"`tests/{folder}`" in text, folder


def test_the_words_on_the_troubleshooting_page_are_said():
    """What a reader looks for there has to be what the agent says."""
    said = "\n".join(path.read_text("utf-8") for path in ROOT.glob("autoteardown/**/*.py"))
    symptoms = [
        line.split("|")[1]
        for line in (DOCS / "troubleshooting.md").read_text("utf-8").splitlines()
        if "|" in line
    ]
    quoted = [
        part
        for symptom in symptoms
        for quote in re.findall(
            r'"([^"]+)"|`(?:step|park|quiet) [a-z]+`: (.+?) *$|`(the registry[^`]+)`', symptom
        )
        for part in re.split(r"…|\d+s", "".join(quote))
        if part.strip()
    ]
    assert len(quoted) > 4
    for part in quoted:
        assert part.strip() in said, part


def rows():
    """The rows of the compatibility page's tables, as lists of cells, without their heads.

    Other people's programs are not part of the project: they were evicted by hand, and the page says so.
    """
    before, by_hand, after = re.split(r"^## Other (?:people's programs|code)", COMPATIBILITY, flags=re.M)
    assert "evicted by hand" in by_hand
    lines = [line for line in (before + after).splitlines() if line.startswith("|")]
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


def blocks(language):
    """The fenced blocks of a language on all pages, with the name of the page."""
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            yield page.name, text


def commands():
    """Every command line on the pages, without comments and continuations."""
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] == "export" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                del words[0]
            if words and not re.fullmatch(r"[A-Z_]+=.*", words[0]):
                yield page, words


COMMANDS = [pytest.param(words, id=f"{page}: {' '.join(words)}"[:90]) for page, words in commands()]


@pytest.mark.parametrize("words", COMMANDS)
def test_the_commands_can_be_given(words):
    """Ours are parsed by the program itself, `make` is asked what it would do, files that are named are there."""
    if words[:3] == ["python", "-m", "autoteardown"]:
        words = words[2:]
    if words[0] == "autoteardown":
        parser = argparse.ArgumentParser()
        importlib.import_module(f"autoteardown.cli.{words[1]}").configure(parser)
        parser.parse_args(words[2:])
    elif words[0] == "make":
        run = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    else:
        # Others' commands: at least what they name of ours exists.
        assert words[0] in {"docker", "kubectl", "pip", "python", "sbatch", "srun", "torchrun"}, words
    for word in words[1:]:
        if word.startswith(("docker/", "docs/", "tests/", "examples/", "benchmarks/")):
            assert (ROOT / word.split(" ")[0]).exists(), word


def test_there_are_commands_on_the_pages():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "text"), [*blocks("yaml"), *blocks("yml")])
def test_the_yaml_on_the_pages_is_yaml(page, text):
    assert yaml.safe_load(text)


@pytest.mark.parametrize(("page", "text"), [*blocks("python")])
def test_the_python_on_the_pages_is_python(page, text):
    ast.parse(text)


@pytest.mark.parametrize(("page", "text"), [*blocks("text")])
def test_the_log_lines_on_the_pages_have_the_form_of_ours(page, text):
    for line in text.splitlines():
        if line.startswith("autoteardown rank="):
            assert LOG_LINE.match(line), line


def test_every_variable_on_the_pages_is_one():
    """Settings that do not exist, or no longer."""
    others = {"AUTOTEARDOWN_TEST_CRDS", "AUTOTEARDOWN_TEST_BASE_IMAGE"}
    for page in PAGES:
        named = set(re.findall(r"\bAUTOTEARDOWN_[A-Z_]+[A-Z]\b", page.read_text("utf-8")))
        assert {name for name in named - others if not settings.known(name)} == set(), page.name

"""The docs say what the code says."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_settings_table_is_the_codes():
    assert subprocess.run([sys.executable, DOCS / "generate.py", "--check"], check=False).returncode == 0


def test_links_lead_somewhere():
    import re

    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

"""A real browser for tests of pages: Debian's chromium, headless."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")


def look(page: Path, script: str, folder: Path, dark: bool = False) -> tuple[Any, list[str]]:
    """Open a copy of a page with a script of the test's at its end.

    Args:
        page: the page, which forbids all scripts but its own: the copy is without that policy.
        script: the body of a function that returns something that JSON can tell.
        folder: a new one, for the browser's profile and the copy.

    Returns:
        What the script returned, and what the page wrote to the console.
    """
    folder.mkdir()
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    assert count == 1
    probe = (
        "<script>addEventListener('load',()=>{"
        f"const result=(()=>{{{script}}})();"
        "const out=document.createElement('pre');out.id='probe';out.textContent=JSON.stringify(result);"
        "document.body.append(out);console.info('the probe ran')})</script>"
    )
    copy = folder / "page.html"
    copy.write_text(text.replace("</body>", probe + "</body>"), "utf-8")
    result = subprocess.run(
        [
            str(CHROMIUM),
            *(
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
            ),
            *(
                "--disable-component-update",
                "--disable-sync",
                "--enable-logging=stderr",
                "--window-size=1280,900",
            ),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, re.S)
    assert found, f"the page did not load: {result.stderr[-2000:]}"
    console = re.findall(r"CONSOLE[^\]]*\] \"(.*?)\", source:", result.stderr, re.S)
    # The control: a browser that logs nothing would pass any test for errors.
    assert "the probe ran" in console, result.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in console if line != "the probe ran"]

"""Builds a self-contained HTML page or SVG file: style, script, escaping. Used by `timeline` and `drill --html`.

1. The page makes no requests: everything is inline, and a content security policy forbids the rest.
2. The policy allows only this page's script (by its hash). A name in a report that got past the escaping could not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable

# Colour-blind readers can distinguish neighbours, too. Bars have a contrast of at least 3:1 with the page, and the
# text in them 4.5:1 with the bar (WCAG 1.4.11, 1.4.3).
PAPER = {"light": "#ffffff", "dark": "#14171c"}
PHASES = {
    "light": {
        "yield": "#6b7280",
        "step": "#005a94",
        "park": "#7a5ad6",
        "drain": "#007a5e",
        "quiet": "#8a6d00",
        "destroy": "#a83f82",
        "abort": "#8c1a00",
        "exit": "#3d4450",
        "other": "#5b6472",
    },
    "dark": {
        "yield": "#9aa1ad",
        "step": "#86cdf7",
        "park": "#957cf0",
        "drain": "#35c29a",
        "quiet": "#e0c04a",
        "destroy": "#f5a9d6",
        "abort": "#f0622a",
        "exit": "#8b93a1",
        "other": "#aab2be",
    },
}
INK = {"light": "#1b1f26", "dark": "#e8eaee"}
SOFT = {"light": "#59616e", "dark": "#a3abb8"}
BAD = {"light": "#b3261e", "dark": "#ff9c92"}


def _scheme(name: str) -> str:
    rule = {"light": "#dfe3e9", "dark": "#333a45"}[name]
    band = {"light": "#f5f7f9", "dark": "#1b2027"}[name]
    colours = {
        "paper": PAPER[name],
        "ink": INK[name],
        "soft": SOFT[name],
        "bad": BAD[name],
        "rule": rule,
        "band": band,
        **PHASES[name],
    }
    return "".join(f"--{key}:{value};" for key, value in colours.items())


COLOURS = (
    ":root{color-scheme:light dark;"
    + _scheme("light")
    + "}@media (prefers-color-scheme:dark){:root{"
    + _scheme("dark")
    + "}}"
)
DRAWING = (
    """
svg text{fill:var(--ink);font-size:11px;font-variant-numeric:tabular-nums;
 font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg .soft{fill:var(--soft)}svg .bad{fill:var(--bad)}svg .in{fill:var(--paper);paint-order:stroke}
svg .paper{fill:var(--paper)}svg .heading{font-size:13px;font-weight:600}
.band{fill:var(--band)}.rule{stroke:var(--rule)}.mark{stroke:var(--ink)}.limit{stroke:var(--bad);fill:var(--bad)}
.lane:hover .hit,.lane:focus .hit{fill:var(--ink);fill-opacity:.08}.hit{fill:#000;fill-opacity:0}
.lane{outline:none}svg .origin{font-weight:700}
.gone{fill:url(#gone)}.signal{fill:var(--ink);stroke:var(--ink)}.peer{fill:var(--paper);stroke:var(--ink)}.lost{fill:none;stroke:var(--bad)}
.timeout{fill:url(#timeout)}.error{fill:url(#error)}
.skipped{fill-opacity:0;stroke-dasharray:3 2}.open{fill-opacity:.45}
"""
    + "".join(f".p-{name}{{fill:var(--{name});stroke:var(--{name})}}" for name in PHASES["light"])
    + "\n"
)
STYLE = (
    COLOURS
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:24px 20px 60px;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:36px 0 4px}
p{margin:4px 0 12px}
code,pre{font:12.5px/1.45 ui-monospace,Consolas,"DejaVu Sans Mono",monospace}
.notice{border-left:4px solid var(--bad);background:var(--band);padding:8px 14px;margin:14px 0}
.notice ul{margin:4px 0;padding-left:20px}
.soft{color:var(--soft)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}.scroll>svg{width:100%;height:auto;min-width:760px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600}th,td{white-space:nowrap}.wrap,td pre{white-space:pre-wrap;min-width:300px}
pre{margin:6px 0;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;padding:4px 0}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:10px 0 6px;padding:0;list-style:none}
.key svg{vertical-align:-2px;margin-right:5px}
"""
    + DRAWING
    + """
#tip{position:fixed;z-index:9;max-width:min(640px,92vw);max-height:60vh;overflow:auto;background:var(--paper);
 color:var(--ink);border:1px solid var(--soft);border-radius:4px;padding:8px 12px;margin:0;
 pointer-events:none;box-shadow:0 4px 18px #0004}
#tip[hidden]{display:none}
.story{font-size:17px;line-height:1.45;max-width:62em;margin:8px 0 10px}
@media(max-width:600px){body{padding:14px 12px 40px}.story{font-size:16px}h2{margin-top:22px}}
@media print{#tip,details:not([open]){display:none}body{max-width:none;padding:0;font-size:11px}
 .story{font-size:13px}.scroll{overflow:visible}.scroll>svg{min-width:0}section{break-inside:avoid}}
"""
)

# Fill patterns are defined once for each page, because ids must be unique in it.
PATTERNS = (
    '<defs><pattern id="timeout" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2.4" height="6" fill="var(--paper)" fill-opacity=".7"/></pattern>'
    '<pattern id="error" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<path d="M0 0L6 6M6 0L0 6" stroke="var(--paper)" stroke-width="1.4"/></pattern>'
    '<pattern id="gone" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="1.5" height="8" fill="var(--soft)" fill-opacity=".6"/></pattern></defs>'
)

# Shows the tooltips. Without this script, the browser's own tooltips show the same text.
SCRIPT = """
(()=>{const tip=document.getElementById("tip");
const show=(text,x,y)=>{tip.textContent=text;tip.hidden=false;
const w=tip.offsetWidth,h=tip.offsetHeight;
tip.style.left=Math.max(4,Math.min(x+14,innerWidth-w-8))+"px";
tip.style.top=Math.max(4,y+16+h>innerHeight?y-h-10:y+16)+"px"};
const hide=()=>{tip.hidden=true};
for(const lane of document.querySelectorAll(".lane")){const title=lane.querySelector("title");
if(!title)continue;const text=title.textContent;title.remove();lane.setAttribute("aria-label",text);
lane.addEventListener("mousemove",e=>show(text,e.clientX,e.clientY));
lane.addEventListener("mouseleave",hide);lane.addEventListener("blur",hide);
lane.addEventListener("focus",()=>{const b=lane.getBoundingClientRect();show(text,b.left+160,b.top)})}
addEventListener("keydown",e=>{if(e.key==="Escape")hide()});addEventListener("scroll",hide,{passive:true})})();
"""


def esc(value: object) -> str:
    """Escape a value as HTML text, or as the value of a quoted attribute."""
    return html.escape(str(value), quote=True)


def document(title: str, body: str) -> str:
    """A complete page around `body`, which is HTML already."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    hidden = f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{PATTERNS}</svg>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(policy)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>{hidden}\n{body}\n"
        f'<pre id="tip" role="status" hidden></pre><script>{SCRIPT}</script></body></html>\n'
    )


def picture(width: int, height: float, body: str) -> str:
    """A complete SVG file around `body`, with a background, because the page that shows it may be light or dark."""
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{COLOURS}{DRAWING}</style>{PATTERNS}'
        f'<rect class="paper" width="100%" height="100%"/>{body}</svg>\n'
    )


def notice(heading: str, lines: Iterable[str]) -> str:
    """A box of warnings; empty if there are none."""
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<div class="notice"><b>{esc(heading)}</b><ul>{items}</ul></div>' if items else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; its cells are HTML already."""
    top = "".join(f"<th>{esc(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'

"""HTML elements, tables and the template of a page: one file, no script, nothing fetched, light and dark.

Text is escaped unless it is `Html`.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Sequence
from string import Template

MAX_TEXT = 2_000  # characters of one piece of text; the rest is cut

# What HTML forbids, what UTF-8 can't hold, and marks that turn the direction of the text after them.
_FORBIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")

NAME = "picture-"  # how names inside an <svg> begin; `page` makes them differ from picture to picture

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --faint: #59616b; --line: #d0d5db; --shade: #f3f5f7; --link: #0b5cad;
  --good: #1a6b2d; --look: #a33a00; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171c; --ink: #e6e9ed; --faint: #a5adb8; --line: #3a414b; --shade: #1d2127; --link: #7db4f0;
  --good: #6fd07f; --look: #ffab5e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 0.5em; }
h1 { font-size: 1.6rem; margin-top: 0.5rem; } h2 { font-size: 1.35rem; } h3 { font-size: 1.1rem; }
h4 { font-size: 1rem; }
a { color: var(--link); } p, li { max-width: 50rem; }
code, pre { font: 0.9em ui-monospace, monospace; background: var(--shade); border-radius: 3px; }
pre { padding: 0.6rem; white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.925rem; }
caption { text-align: left; color: var(--faint); padding-bottom: 0.3rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(50rem, calc(100vw - 2rem)); }
th, td, li, code { unicode-bidi: isolate; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.7rem 0.25rem 0; overflow-wrap: normal;
  border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
.charts { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; max-width: 36rem; } figure > svg { display: block; width: 100%; height: auto; }
figcaption { font-weight: 600; }
svg text { fill: currentColor !important; } .verdict { font-size: 1.1rem; }
.findings { padding-left: 0; list-style: none; } .findings > li { margin-bottom: 0.5rem; }
.good { color: var(--good); } .look { color: var(--look); } .faint { color: var(--faint); }
details { border-top: 1px solid var(--line); padding: 0.4rem 0; } summary { cursor: pointer; font-weight: 600; }
@media print { :root { color-scheme: light; } figure, tr { break-inside: avoid; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


class Html(str):
    """Text that is HTML already."""


def plain(text: str) -> str:
    """Any text, cut at MAX_TEXT characters, forbidden characters replaced."""
    return _FORBIDDEN.sub("\ufffd", text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…")


def escape(text: str) -> Html:
    """Text as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(plain(text)))


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. Children and attributes are escaped; `class_` and `aria_label` are class and aria-label."""
    words = [f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()]
    return Html(f"<{name}{''.join(words)}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Parts in order, one per line."""
    return Html("\n".join(map(escape, parts)))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its header."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", join(body)))
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def details(summary: str, *children: str) -> Html:
    """A part that opens on a click."""
    return tag("details", tag("summary", summary), *children)


def page(title: str, *children: str) -> str:
    """A complete HTML document."""
    number = itertools.count()

    def renamed(picture: re.Match[str]) -> str:
        return re.sub(f'(["#]){NAME}', rf"\g<1>{NAME}{next(number)}-", picture[0])

    body = re.sub("<svg .*?</svg>", renamed, join(children), flags=re.DOTALL)
    return PAGE.substitute(title=escape(title), style=STYLE, body=tag("h1", title) + "\n" + body)

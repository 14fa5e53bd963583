"""Sphinx: `make docs` builds the site from these Markdown files, without a network.

While the site is built, docs/generated gets a page of all commands, from the commands themselves, and a page for each
report in experiments/.
"""

import contextlib
import inspect
import io
import os
import pathlib
import re
from importlib import metadata
from typing import Any

from sphinx.ext import autosummary

from lolo.cli import main

project = "LoLO"
author = "The LoLO developers"
release = metadata.version("lolo")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
nb_execution_mode = "off"  # `make notebook` runs them; what they show is stored in them
nb_render_markdown_format = "myst"  # tables, too
myst_heading_anchors = 4
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["torch", "triton"]  # neither is needed to build the site
html_theme = "furo"
html_title = f"LoLO {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
exclude_patterns = ["_build"]
python_maximum_signature_line_length = 80

DOCS = pathlib.Path(__file__).parent
EXPERIMENTS = DOCS.parent / "experiments"
GENERATED = DOCS / "generated"
COMMANDS_INTRODUCTION = """# Commands

Made from the commands themselves when this site is built: each section is what `lolo COMMAND --help` prints.
"""
DEEPER = {"train": ("lolo", "norm-fc"), "data": ("prepare", "list", "verify")}  # words that have a help of their own
LISTS = ("recipes", "tasks", "weights")  # commands whose output is short and worth a place


def printed(*words: str) -> str:
    """What `lolo WORDS` prints, in a block of text under its command line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main.run(list(words))
    return f"```text\n$ lolo {' '.join(words)}\n{output.getvalue().strip()}\n```\n"


def write_commands(_: object) -> None:
    """Write the page of all commands."""
    os.environ["COLUMNS"] = "88"
    parts = [COMMANDS_INTRODUCTION, printed("--help")]
    for name in main.COMMANDS:
        parts.append(f"## lolo {name}\n")
        if name not in DEEPER or name == "data":
            parts.append(printed(name, "--help"))
        parts += [printed(name, word, "--help") for word in DEEPER.get(name, ())]
        if name in LISTS:
            parts.append(printed(name))
    GENERATED.mkdir(exist_ok=True)
    (GENERATED / "commands.md").write_text("\n".join(parts), encoding="utf-8")


def report_page(report: str) -> str:
    """The name of the page of a report, given by its path in experiments/ without .md."""
    return "report-" + re.sub(r"\W+", "-", report)


def write_reports(_: object) -> None:
    """Write a page for each report in experiments/: the same text, with the paths of its pictures."""
    for page in GENERATED.glob("report-*.md"):
        page.unlink()
    for path in sorted(EXPERIMENTS.rglob("report*.md")):
        folder = path.parent.relative_to(EXPERIMENTS).as_posix()
        text = re.sub(r"^#", "##", path.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r"!\[(.*?)\]\(", rf"![\1](../../experiments/{folder}/", text)
        page = GENERATED / f"{report_page(path.relative_to(EXPERIMENTS).with_suffix('').as_posix())}.md"
        page.write_text(f"---\norphan: true\n---\n\n# Report: {folder}\n\n{text}", encoding="utf-8")


def link_reports(_: object, name: str, source: list[str]) -> None:
    """Links to reports in the repository become links to their pages on the site."""
    up = "../" * name.count("/")
    source[0] = re.sub(
        r"\]\((?:\.\./)+experiments/([^)]*?report[^)/]*)\.md\)",
        lambda link: f"]({up}generated/{report_page(link[1])}.md)",
        source[0],
    )


def keep_intervals(_: object, name: str, source: list[str]) -> None:
    """Numbers such as 0.12 ± 0.03 are not broken over two lines."""
    source[0] = source[0].replace(" ± ", "\u00a0±\u00a0")


def as_rst(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are written as Markdown has it, `name` for code; reStructuredText wants ``name`` and escapes."""
    found: list[str] = []
    in_example = False
    for line in lines:
        in_example = line.lstrip().startswith((">>>", "...")) or (in_example and bool(line.strip()))
        if in_example:
            found.append(line)
            continue
        words = re.split(r"(`[^`]+`)", line)
        line = "".join(f"`{x}`" if x.startswith("`") else re.sub(r"([*|])", r"\\\1", x) for x in words)
        head = re.match(r"(Returns|Raises): (.*)", line)
        if head:
            found += [f"**{head[1]}:** {head[2]}"]
        elif found and re.match(r"\*\*(Returns|Raises):", last_start(found)) and line.startswith("  "):
            found.append(line.strip())
        else:
            found.append(line)
    lines[:] = found


def last_start(lines: list[str]) -> str:
    """The first line of the paragraph that `lines` end in."""
    start = len(lines) - 1
    while start > 0 and lines[start - 1].strip():
        start -= 1
    return lines[start]


def signature_of_torch(app: object, what: str, name: str, thing: Any, options: object, *signature: str) -> Any:
    """The arguments of `lolo.torch.LoLO`, which its class hides while torch is mocked."""
    if name != "lolo.torch.LoLO":
        return signature
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare)), None


def setup(app: Any) -> None:
    autosummary.WELL_KNOWN_ABBREVIATIONS += ("(Eq.", "Eq.")  # no ends of a sentence
    app.connect("builder-inited", write_commands)
    app.connect("builder-inited", write_reports)
    app.connect("source-read", link_reports)
    app.connect("source-read", keep_intervals)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("autodoc-process-signature", signature_of_torch)

"""Every block of Python in the documentation runs, page by page, in a folder that holds the files it speaks of."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
from helpers import with_slow
from test_readers import write_npz

from lolo.data import prepare
from lolo.optimizers import interop
from lolo.race import records, report, results, stages
from lolo.studies.names import in_words

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "studies").glob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def interop_files(folder):
    rng = np.random.default_rng(0)
    shapes = interop.spec.weight_shapes(32)
    interop.export_learned_optimization({n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}, "theta.state")


def prepared_data(folder):
    (folder / "downloads").mkdir()
    write_npz(folder / "downloads")
    prepare.prepare("imagenet32", folder / "downloads", folder / "data" / "imagenet32")


FILES = {"interop": interop_files, "data": prepared_data}


@pytest.mark.parametrize(
    "page",
    with_slow(filter(blocks, PAGES), {ROOT / "docs" / "add_your_own.md"}),
    ids=lambda page: page.stem,
)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FILES.get(page.stem, lambda folder: None)(tmp_path)
    names = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


def cells(kind):
    notebook = json.loads((ROOT / "docs" / "first_optimizer.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_was_run_from_its_top_to_its_end_without_an_error():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    assert "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.slow
def test_the_notebook_s_code_runs(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    code = "\n".join("".join(cell["source"]) for cell in cells("code"))
    shorter = {'"outer.steps": 200': '"outer.steps": 2, "unroll.length": 100', "steps=1000": "steps=50"}
    for large, small in shorter.items():
        assert large in code
        code = code.replace(large, small)
    names = {}
    exec(compile(code, "first_optimizer.ipynb", "exec"), names)
    assert {row.optimizer for row in names["comparison"].rows} == {"mine", "untrained", "AdamW", "Muon"}


def links(page):
    """The files that a page links to."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    return [page.parent / target for target in targets]


def test_pages_link_to_what_is_there():
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in links(page):
            assert target.exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_contents():
    for contents in (ROOT / "docs" / "index.md", ROOT / "docs" / "studies" / "index.md"):
        listed = re.findall(
            r"^[\w/]+$", "".join(re.findall(r"```{toctree}(.*?)```", contents.read_text(), re.DOTALL)), re.M
        )
        assert {page.stem for page in PAGES if page.parent == contents.parent} - {"index"} <= set(listed)


CLAIMS = {  # the text of the claims, by their page; one page holds nothing else
    page: page.read_text().rpartition("## Claims")[2]
    for page in (ROOT / "docs" / "results.md", ROOT / "docs" / "studies" / "earlier.md")
}


def claims(pages=tuple(CLAIMS)):
    """Rows of the claims: the claim, its numbers in train and test loss, the page that has them."""
    row = re.compile(r"^\| \[(.+?)\]\((.+?)\) \| .+? \| [\d,]+ \| \d \| (.*?) \| (.*?) \|$", re.M)
    return [
        pytest.param(claim, train, test, (page.parent / where).resolve(), id=f"{page.stem}-{number}-{claim}")
        for page in pages
        for number, (claim, where, train, test) in enumerate(row.findall(CLAIMS[page]))
    ]


def test_every_row_of_the_claims_is_checked():
    lines = re.findall(r"^\| (.*)$", "".join(CLAIMS.values()), re.M)
    assert len([line for line in lines if not line.startswith(("claim", "---"))]) == len(claims()) > 80


INTERVAL = re.compile(r"([−+-]?)([\d,.]+) ± ([\d.]+)")


def intervals(text):
    return {(sign.replace("−", "-"), value, half) for sign, value, half in INTERVAL.findall(text)}


@pytest.mark.parametrize(("claim", "train", "test", "page"), claims())
def test_a_claim_is_short_agrees_with_its_numbers_and_stands_on_a_page_with_files_behind_it(claim, train, test, page):
    assert len(re.findall(r"[\w`'.-]*\w[\w`'.-]*", claim)) <= 12
    reports = [target for target in links(page) if ROOT / "experiments" in target.resolve().parents]
    assert reports
    texts = [page.read_text(), *(report.read_text() for report in reports if report.suffix == ".md")]
    for number in filter(None, (train, test)):
        verdict = number[0]
        assert verdict in "✓~✗" and number[1] == "\u00a0"
        assert intervals(number) <= intervals("".join(texts))
        for sign, value, half in intervals(number):
            if sign and float(half) < float(value):
                assert verdict == {"-": "✓", "+": "✗"}[sign]
            elif sign:
                assert verdict == "~"


@pytest.mark.parametrize("page", ["results.md", "studies/race.md"])
def test_the_table_of_the_race_is_that_of_the_published_rows(page):
    published = stages.read(records.KEPT)
    times = {(t.workload, t.entrant): t.seconds for t in published.step_times}
    by_rules = {
        rules: {of.entrant: of for of in results.standings(published.rows, published.targets, rules, times)}
        for rules in results.RULES
    }
    expected = set()
    for name, one in by_rules["self-tuning"].items():
        five = by_rules["tuned"][name]
        reached = [f"{sum(map(math.isfinite, of.steps.values()))} of {len(of.steps)}" for of in (one, five)]
        scores = [report.number(x) for x in (one.profile, five.profile, five.speed_up, five.speed_up_seconds)]
        label = in_words(name)
        if "lolo-" in name:
            searched = len({row.optimizer for row in published.rows if row.entrant == name}) > 1
            kind = "searched" if searched else "with a cosine" if name == "lolo-small" else "as shipped"
            label = f"`{name.removesuffix('-as-shipped')}` {kind}"
        expected.add((label, scores[0], reached[0], scores[1], reached[1], *scores[2:]))
    lines = re.findall(r"^\|(.*± .* of .*)\|$", (ROOT / "docs" / page).read_text().replace("**", ""), re.M)
    assert {tuple(cell.strip() for cell in line.split("|")) for line in lines} == expected and len(expected) == 16


@pytest.mark.parametrize("page", CLAIMS, ids=lambda page: page.stem)
def test_losses_stand_first(page):
    """Claims that lose in train or test loss, then those that do neither, then those that win."""

    def group(train, test):
        verdicts = train[:1] + test[:1]
        return 0 if "✗" in verdicts else 2 if "✓" in verdicts else 1

    found = [group(*parameter.values[1:3]) for parameter in claims([page])]
    assert found == sorted(found) and set(found) == {0, 1, 2}

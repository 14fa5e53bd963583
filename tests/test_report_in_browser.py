"""Reports in headless Chromium: nothing fetched, nothing complained about, drawn and readable, light and dark."""

import os

import pytest
from test_report import QUICK, make_run, make_study

from lolo.report.page import write

pytestmark = pytest.mark.browser

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")

TEXTS = """() => [...document.querySelectorAll('h1, h2, h3, p, li, a, caption, th, td, summary, strong, svg text')]
  .filter(e => e.getClientRects().length && e.textContent.trim())
  .map(e => { const style = getComputedStyle(e), svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return {what: e.tagName, text: e.textContent.slice(0, 30), size: scale * parseFloat(style.fontSize),
      colour: svg ? style.fill : style.color, picture: !!svg}; })"""

PICTURES = """() => [...document.querySelectorAll('svg[role=img]')].map(svg => {
  const box = svg.getBoundingClientRect();
  const lines = [...svg.querySelectorAll('path')].filter(p => parseFloat(getComputedStyle(p).strokeWidth) >= 1.5);
  return {label: svg.ariaLabel, width: box.width, height: box.height,
    texts: svg.querySelectorAll('text').length,
    lines: lines.map(p => ({colour: getComputedStyle(p).stroke, length: p.getTotalLength()}))}; })"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    if not os.environ.get("LOLO_CHROMIUM"):
        pytest.fail("LOLO_CHROMIUM names no browser; `make browser-test` finds or installs one.")
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as in a container; the page holds our own text only.
        browser = playwright.chromium.launch(executable_path=os.environ["LOLO_CHROMIUM"], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "run")
    make_study(folder / "study")
    return write([folder / "run", folder / "study", QUICK], folder / "report.html")


def opened(chromium, path, width, scheme):
    """A page with every part open, what it asked for beyond itself, and what it complained about."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, asked, complaints = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    return page, [url for url in asked if url != path.as_uri()], complaints


def luminance(colour):
    """Relative luminance (WCAG 2) of a computed colour, rgb(r, g, b)."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_is_drawn_and_readable(chromium, written, width, scheme):
    page, asked, complaints = opened(chromium, written, width, scheme)
    assert asked == [] and complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.9) if scheme == "light" else (luminance(paper) < 0.05)
    texts = page.evaluate(TEXTS)
    assert sum(text["picture"] for text in texts) > 50
    for text in texts:
        assert contrast(text["colour"], paper) >= 4.5, text
        assert text["size"] >= (9.5 if text["picture"] else 13), text

    pictures = page.evaluate(PICTURES)
    assert len(pictures) == page.locator("figure").count() > 10
    for picture in pictures:
        assert picture["label"] and picture["texts"] > 4 and picture["lines"], picture
        assert picture["width"] >= 300 and picture["height"] >= 190, picture
        assert max(line["length"] for line in picture["lines"]) > 10, picture["label"]
        assert all(contrast(line["colour"], paper) >= 3 for line in picture["lines"]), picture["label"]


def test_the_checks_can_tell(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<p style='width: 900px'>wide</p><img src='https://localhost/x.png'><script>missing()</script>")
    page, asked, complaints = opened(chromium, path, 390, "light")
    assert asked == ["https://localhost/x.png"] and any("missing" in text for text in complaints)
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    assert contrast("rgb(255, 255, 255)", "rgb(0, 0, 0)") == pytest.approx(21)

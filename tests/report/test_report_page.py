"""A report in a real browser: it shows the library's numbers, runs no code from a dataset and makes no request."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.tables import make_provenance, make_token_scores

from resofilter_trainer.report import Contents, Report, write_report
from resofilter_trainer.report.contents import scores_of_tokens, selection_of_tokens
from resofilter_trainer.report.theme import COLOURS
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.selection import KEPT
from resofilter_trainer.selecting.token_selection import TokenSelector

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ROWS, PAGE = 300, 25
HACK = "<img src=x onerror=window.hacked=1>"
HOSTILE = [
    "<script>window.hacked=1</script>",
    f"</script>{HACK}",
    "<svg onload=window.hacked=1>",
    "{{7*7}} {% raw %} ${7*7}",
    "\u202eright to left\u202c",
    "zero\u200bwidth\ufeff",
]
SCRIPTS = ["שלום עולם", "नमस्ते दुनिया", "汉字 かな"]
COPIED, COPY = 20, 21
GROUPS = ["math", HACK, "=1+1", "", "__proto__"]
REASONS = ["=HYPERLINK(1)", f"{HACK}\u202e", 'a "quoted", reason']
TITLE = f"</title>{HOSTILE[0]}{{{{7*7}}}}"
IGNORED = ("blob:", "data:", "about:")  # made by the page itself


def make_table() -> ScoreTable:
    """A table with ties, rows without a score, and a score of NaN."""
    draw = np.random.default_rng(0)
    score = draw.integers(0, 120, ROWS) / 7
    score[[COPIED, COPY, 30]] = -1, 99, np.nan
    missing = np.arange(ROWS) % 50 == 49
    columns = {"score": score, "loss": draw.gamma(2, 1, ROWS), "num_tokens": draw.integers(1, 60, ROWS)}
    table = {name: pa.array(values, mask=missing) for name, values in columns.items()}
    reason = pa.array(["no completion" if each else None for each in missing], pa.string())
    return ScoreTable(
        pa.table({"sample_id": np.arange(ROWS), **table, "reason": reason}), make_provenance(rows=ROWS, model=HACK)
    )


TABLE = make_table()
DECIDED = DataSelector(keep=0.4).select(TABLE)
REASON = [REASONS[row % 3] if why == "largest 60 %" else why for row, why in enumerate(DECIDED.reason)]
TEXTS = [(f"What is {row}?\n", f"unlike {row * 7919} any {row * 104729} number {row} here") for row in range(ROWS)]
for place, hostile in enumerate(HOSTILE + SCRIPTS):
    TEXTS[place] = (hostile, hostile)
TEXTS[COPY] = TEXTS[COPIED]
GROUP = [GROUPS[row % len(GROUPS)] for row in range(ROWS)]
IDS = [f"=id-{row:03d}" if row % 3 else f"-{row}.5" for row in range(ROWS)]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    contents = Contents(TABLE, dataclasses.replace(DECIDED, reason=REASON))
    return write_report(contents, tmp_path_factory.mktemp("report"), TEXTS, GROUP, title=TITLE, ids=IDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Any]]:
    """A function that opens a file. At the end there was no error, no request and no injected code."""
    pages, wrong = [], []

    def opened(path: Path, **options: Any) -> Any:
        page = browser.new_page(**options)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        asked = (path.as_uri(), *IGNORED)
        page.on("request", lambda request: None if request.url.startswith(asked) else wrong.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield opened
    hacked = [page.evaluate("window.hacked") for page in pages]
    for page in pages:
        page.close()
    assert wrong == []
    assert hacked == [None] * len(pages)


@pytest.fixture
def page(visit, report) -> Any:
    return drawn(visit(report.path))


def drawn(page: Any) -> Any:
    page.wait_for_selector("html[data-drawn]")
    return page


def rows_of_page(page: Any) -> list[int]:
    lines = page.locator("#samples tbody tr:not(.details) td:nth-child(2)")
    return [int(each) for each in lines.all_text_contents()]


def found(page: Any) -> int:
    return int(page.locator("#found").text_content().split()[0])


def search(page: Any, text: str) -> list[int]:
    page.fill("#search", text)
    return rows_of_page(page)


def details(page: Any, row: int) -> Any:
    assert search(page, f"#{row}") == [row]
    if not page.locator("tr.details").count():
        page.click(f'[aria-label="Row {row}"]')
    return page.locator("tr.details")


def visible(text: str) -> str:
    """The text with invisible characters as the page shows them."""
    for hidden in "\u202e\u202c\u200b\ufeff":
        text = text.replace(hidden, f"U+{ord(hidden):04X}")
    return text


def ordered(name: str, down: bool, rows: Any = range(ROWS)) -> list[int]:
    """Rows sorted by a column: missing values last, ties in the order of the dataset."""
    values = np.arange(ROWS) if name == "row" else TABLE.column(name)
    return sorted(rows, key=lambda row: (math.isnan(values[row]), -values[row] if down else values[row], row))


# ---- text from a dataset is never markup


def test_opens_without_an_error_or_a_request(page):
    assert page.locator(".chart svg").count() == page.locator(".chart").count() >= 4


@pytest.mark.parametrize("row", range(len(HOSTILE + SCRIPTS)))
def test_text_is_shown_as_it_is(page, row):
    shown = details(page, row)
    expected = visible((HOSTILE + SCRIPTS)[row])
    assert shown.locator(".prompt").text_content() == expected
    assert shown.locator(".completion").text_content() == expected
    assert page.locator("td.snippet").text_content() == expected
    assert page.locator("#samples :is(script, img, svg)").count() == 0


def revealed(text: str) -> str:
    """The text with characters that change its direction as the page shows them."""
    return text.replace("\u202e", "U+202E")


def test_names_and_reasons_are_shown_as_they_are(page):
    assert page.title() == TITLE
    assert page.locator("h1").text_content() == TITLE
    assert HACK in page.locator("#verdict").text_content()
    options = page.locator("#group option").all_text_contents()
    assert options == ["all", *(name or "(none)" for name in sorted(GROUPS))]
    reasons = page.locator("#reasons tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.textContent))"
    )
    expected = Counter(revealed(why) for why in REASON if why != KEPT)
    assert {why: int(count) for why, count in reasons} == expected
    dropped = next(row for row in range(ROWS) if REASON[row] == REASONS[1])
    search(page, f"#{dropped}")
    assert page.locator("#samples tbody tr").text_content().count(revealed(REASONS[1])) == 1


# ---- search, filters, sorting


def test_rows_are_found_by_text_and_by_number(page):
    assert search(page, "NUMBER 117 here") == [117]
    assert search(page, "#17") == [17]
    assert search(page, "=ID-118") == [118]
    assert search(page, "<script>") == [0]
    assert search(page, SCRIPTS[1]) == [len(HOSTILE) + 1]
    assert search(page, "nowhere to be found") == []
    assert page.locator("#page").text_content() == "page 1 of 1"


def test_filters_give_the_counts_of_the_library(page):
    for decision, keep in (("kept", True), ("dropped", False)):
        page.select_option("#decision", decision)
        assert found(page) == (DECIDED.keep == keep).sum()
        for group in filter(None, GROUPS):
            page.select_option("#group", group)
            own = [row for row in range(ROWS) if GROUP[row] == group and DECIDED.keep[row] == keep]
            assert found(page) == len(own)
            assert rows_of_page(page) == ordered("score", True, own)[:PAGE]
        page.select_option("#group", "")


def test_a_group_without_a_name_can_be_chosen(page):
    page.select_option("#group", index=1 + sorted(GROUPS).index(""))
    assert found(page) == GROUP.count("")


@pytest.mark.parametrize("down", [True, False], ids=["descending", "ascending"])
@pytest.mark.parametrize("name", ["score", "num_tokens", "row"])
def test_sorting_is_numpys(page, name, down):
    header = page.locator(f'#samples th[data-name="{name}"]')
    while header.get_attribute("aria-sort") != ("descending" if down else "ascending"):
        header.locator("button").click()
    assert rows_of_page(page) == ordered(name, down)[:PAGE]


def test_every_row_is_on_one_page(page):
    pages = [rows_of_page(page)]
    assert page.locator("#previous").is_disabled()
    while page.locator("#next").is_enabled():
        page.click("#next")
        pages.append(rows_of_page(page))
    assert [row for each in pages for row in each] == ordered("score", True)
    assert page.locator("#page").text_content() == "page 12 of 12"
    page.click("#previous")
    assert rows_of_page(page) == pages[-2]


# ---- what if, and the verdict


@pytest.mark.parametrize("percent", [1, 29, 40, 50, 99, 100])
def test_the_slider_shows_what_the_selector_does(page, percent):
    page.locator("#keep").evaluate("(it, to) => { it.value = to; it.dispatchEvent(new Event('input')); }", percent)
    keep = DataSelector(keep=percent / 100).select(TABLE).keep
    shown = {name: page.locator(f"#what-if-{name}").text_content() for name in ("rows", "tokens", "dropped")}
    tokens = np.nan_to_num(TABLE.column("num_tokens"))
    assert page.locator("#keep-shown").text_content() == f"{percent} %"
    assert shown == {"rows": f"{keep.sum()}", "tokens": f"{tokens[keep].sum():,.0f}", "dropped": f"{(~keep).sum()}"}
    lines = page.locator("#what-if-groups tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    dropped = ~keep
    expected = [[name, str(sum(dropped[np.array(GROUP) == name])), str(GROUP.count(name))] for name in GROUPS]
    assert sorted(lines) == sorted(expected)
    shown = {"kept": keep, "dropped": ~keep, "changed": keep != DECIDED.keep}
    assert page.locator("#decision option:checked").text_content() == f"dropped at {percent} %"
    for name, rows in shown.items():
        page.select_option("#decision", label=f"{name} at {percent} %")
        assert found(page) == rows.sum()
        assert rows_of_page(page) == ordered("score", True, np.flatnonzero(rows))[:PAGE]


def test_a_link_shows_the_rows_whose_decision_changes(page):
    page.locator("#keep").evaluate("(it) => { it.value = 70; it.dispatchEvent(new Event('input')); }")
    page.click("#what-if-show")
    keep = DataSelector(keep=0.7).select(TABLE).keep
    assert found(page) == (keep != DECIDED.keep).sum()
    assert set(page.locator("#samples td.decision").all_text_contents()) == {"kept at 70 %"}
    page.select_option("#decision", "")
    assert found(page) == ROWS


def test_the_verdict_is_the_selections(page):
    tokens = np.nan_to_num(TABLE.column("num_tokens"))
    share, kept = tokens[DECIDED.keep].sum() / tokens.sum(), DECIDED.keep.sum()
    verdict = page.locator("#verdict").text_content().replace("\u00a0", " ")
    tokens_kept = f"with {100 * share:.1f} % of the learnt tokens"
    assert verdict.startswith(f"{kept} of {ROWS} rows are kept, {tokens_kept}; {ROWS - kept} are dropped.")
    assert page.locator("#keep").input_value() == str(round(100 * kept / TABLE.scored.sum()))


# ---- one row


def test_a_row_opens_by_keyboard(page):
    page.focus("#csv")
    for _ in range(20):
        page.keyboard.press("Tab")
        if (page.evaluate("document.activeElement.ariaLabel") or "").startswith("Row "):
            break
    page.keyboard.press("Enter")
    row = ordered("score", True)[0]
    button = page.locator(":focus")
    assert (button.get_attribute("aria-label"), button.get_attribute("aria-expanded")) == (f"Row {row}", "true")
    assert [page.locator(f"tr.details .{kind}").text_content() for kind in ("prompt", "completion")] == [*TEXTS[row]]
    page.keyboard.press("Enter")
    assert page.locator("tr.details").count() == 0


def test_links_lead_to_the_copy_and_to_the_most_similar_row(page):
    links = details(page, COPY).locator("button.link")
    assert links.all_text_contents()[:2] == [f"row {COPIED}", f"row {COPIED} (1)"]
    links.nth(0).click()
    assert rows_of_page(page) == [COPIED]
    details(page, COPIED).get_by_text(f"row {COPY} (1)").click()
    assert rows_of_page(page) == [COPY]


def test_a_link_leads_to_a_row_that_a_filter_hides(page):
    assert (DECIDED.keep[COPIED], DECIDED.keep[COPY]) == (True, False)
    page.select_option("#decision", "dropped")
    details(page, COPY).locator("button.link").first.click()
    assert rows_of_page(page) == [COPIED]


def test_saved_rows_are_those_that_are_found(page):
    page.select_option("#decision", "dropped")
    with page.expect_download() as download:
        page.click("#csv")
    with download.value.path().open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = ordered("score", True, np.flatnonzero(~DECIDED.keep))
    assert [int(line["row"]) for line in lines] == rows
    for line, row in zip(lines, rows, strict=True):
        for name in ("score", "loss", "num_tokens"):
            assert float(line[name] or "nan") == pytest.approx(TABLE.column(name)[row], rel=0, abs=0, nan_ok=True)
        assert line["decision"] == "dropped"
        assert line["id"] == IDS[row].replace("=id", "'=id")
        assert (line["prompt"], line["completion"]) == TEXTS[row]
        assert line["group"] == GROUP[row].replace("=1+1", "'=1+1")
        assert line["reason"] == REASON[row].replace("=HYPERLINK", "'=HYPERLINK")


# ---- how it looks


@pytest.mark.parametrize("first", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_charts_have_the_colours_of_the_theme(visit, report, first):
    page = drawn(visit(report.path, color_scheme=first))
    other = {"light": "dark", "dark": "light"}
    marks = {"kept": "#chart-scores .mark-rect path >> nth=0", "muted": "#chart-scores .role-axis-label text >> nth=0"}
    for theme in (first, other[first], first):
        assert page.locator("html").get_attribute("data-theme") == theme
        for name, mark in marks.items():
            red, green, blue = (int(COLOURS[theme][name][place : place + 2], 16) for place in (1, 3, 5))
            fill = page.locator(mark).evaluate("it => getComputedStyle(it).fill")
            assert fill == f"rgb({red}, {green}, {blue})", (theme, name)
        page.click("#theme")


@pytest.mark.parametrize("width", [pytest.param(1400, marks=pytest.mark.slow), 420])
def test_the_page_is_no_wider_than_the_window_and_all_of_it_can_be_read(visit, report, width):
    page = drawn(visit(report.path, viewport={"width": width, "height": 900}))
    details(page, 0)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tables = "[...document.querySelectorAll('.scroll')].map(each => each.scrollWidth - each.clientWidth)"
    assert max(page.evaluate(tables)) <= 0, "a table is cut"
    sizes = """[...document.querySelectorAll('.chart svg text')].map(text => {
        const [svg, size] = [text.ownerSVGElement, parseFloat(getComputedStyle(text).fontSize)];
        return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    })"""
    assert min(page.evaluate(sizes)) >= 11, "text of a chart is too small"
    outside = """[...document.querySelectorAll('.chart svg text')].map(each => each.getBoundingClientRect())
        .filter(box => box.width && (box.left < 0 || box.right > innerWidth)).length"""
    assert page.evaluate(outside) == 0, "text of a chart is cut"


def test_no_chart_is_alone_in_half_a_row(page):
    """At 1280 px, figures stand in rows of two; one alone has the whole row."""
    widths = """[...document.querySelectorAll('.figures')].map(all => {
        const boxes = [...all.children].map(each => each.getBoundingClientRect());
        return boxes.map(box => [Math.round(box.top), Math.round(100 * box.width / all.clientWidth)]);
    })"""
    for figures in page.evaluate(widths):
        rows = Counter(top for top, _ in figures)
        assert all(width > 90 for top, width in figures if rows[top] == 1)


@pytest.mark.slow
def test_the_page_moves_only_for_readers_who_do_not_mind(visit, report):
    scrolling = "getComputedStyle(document.documentElement).scrollBehavior"
    assert visit(report.path, reduced_motion="reduce").evaluate(scrolling) == "auto"
    assert visit(report.path, reduced_motion="no-preference").evaluate(scrolling) == "smooth"


@pytest.mark.parametrize(
    "what", ["title", *(pytest.param(each, marks=pytest.mark.slow) for each in ("model", "group", "reason"))]
)
def test_names_without_a_space_are_wrapped(visit, tmp_path, what):
    long = {what: "/home/someone/models/a_run_with_a_long_name/checkpoint-10000"}
    provenance = dataclasses.replace(TABLE.provenance, model=long.get("model", "tiny"))
    reason = [why if why == KEPT else long.get("reason", "gone") for why in REASON]
    selection = dataclasses.replace(DECIDED, reason=reason, provenance=provenance.to_json())
    contents, groups = Contents(ScoreTable(TABLE.table, provenance), selection), [long.get("group", "a")] * ROWS
    path = write_report(contents, tmp_path, groups=groups, title=long.get("title")).path
    page = drawn(visit(path, viewport={"width": 400, "height": 900}))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_in_a_notebook_it_is_drawn_without_access_to_the_notebook(visit, report, tmp_path):
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset=utf-8><body>{report._repr_html_()}</body>", encoding="utf-8")
    frame = drawn(visit(notebook).frames[1])
    assert frame.locator(".chart svg").count() >= 4
    assert details(frame, 1).locator(".completion").text_content() == HOSTILE[1]
    assert frame.evaluate("window.hacked") is None
    assert (
        frame.evaluate("() => { try { return parent.document.title } catch (e) { return e.name } }") == "SecurityError"
    )


# ---- tokens, and a comparison


@pytest.mark.slow
def test_tokens_are_coloured_by_what_is_learnt_or_by_loss(visit, tmp_path):
    losses = [[(3.0, 0.0), (1.0, 0.9), (2.0, 0.0)], [(0.5, 0.4)]]
    cleaned = TokenSelector(0.5).select(make_token_scores(losses, provenance=make_provenance(rows=4)))
    names = ["<b>", "\u202e", " c", "d"]
    contents = Contents(scores_of_tokens(cleaned.scores), selection_of_tokens(cleaned), cleaned=cleaned)
    texts = [("prompt", "response")] * 4
    path = write_report(contents, tmp_path, texts, decode=lambda ids: [names[each] for each in ids]).path
    page = drawn(visit(path))
    tokens = details(page, 0).locator(".token")
    assert tokens.all_text_contents() == ["<b>", "U+202E", " c"]
    assert page.locator(".token.masked").all_text_contents() == ["U+202E"]
    page.select_option("#colour", "loss")
    colours = page.locator(".token").evaluate_all("each => each.map(it => it.style.backgroundColor)")
    assert page.locator(".token.masked").count() == 0
    strength = [float(colour.removesuffix(")").replace("/", ",").split(",")[-1].strip(" %")) for colour in colours]
    assert sorted(range(3), key=lambda place: strength[place]) == [1, 2, 0]
    assert details(page, 1).locator(".token").count() == 0


def test_tokens_are_shown_where_there_is_no_text(visit, tmp_path):
    cleaned = TokenSelector(1).select(make_token_scores([[(1.0, 0.0)]], provenance=make_provenance(rows=1)))
    contents = Contents(scores_of_tokens(cleaned.scores), selection_of_tokens(cleaned), cleaned=cleaned)
    page = drawn(visit(write_report(contents, tmp_path, decode=lambda ids: ["learnt"] * len(ids)).path))
    assert details(page, 0).locator(".token").all_text_contents() == ["learnt"]


def test_a_comparison_alone_shows_its_ratios(visit, tmp_path):
    names = ("selector", "model", "keep", "metric", "metric_low", "metric_high")
    values = [("full", "m", 1.0, 0.6, 0.5, 0.7), (HACK, "m", 0.5, 0.7, None, None), (HACK, "m", 0.25, 0.5, 0.4, 0.6)]
    lines = [dict(zip(names, each, strict=True)) for each in values]
    page = drawn(visit(write_report(Contents(None, comparison={"lines": lines}), tmp_path, title=TITLE).path))
    assert page.locator("#chart-ratios svg").count() == page.locator(".chart").count() == 1
    assert HACK[:10] in page.locator("#chart-ratios").text_content()
    assert page.locator("#samples, #verdict").count() == 0

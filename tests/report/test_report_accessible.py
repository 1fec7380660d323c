"""What a screen reader and weak eyes need: contrast, headings in order, names for every control and chart."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.ledgers import drawn, write_ledger
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import read_contents, write_report
from resofilter_trainer.report.theme import COLOURS, TEXT_SIZE, page_config, picture_config
from resofilter_trainer.selecting.results import NAME

VOID = {"meta", "input", "link", "br", "img"}
CONTROLS = {"input", "select", "output"}


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", list(COLOURS))
def test_colours_can_be_told_from_what_is_behind_them(theme):
    colours = COLOURS[theme]
    for text, ground in itertools.product(("ink", "muted", "kept", "dropped"), ("paper", "faint")):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["other"], colours["paper"]) >= 3  # lines and marks
    assert COLOURS[theme].keys() == COLOURS["light"].keys()


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == 21
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("config", [page_config(), picture_config()], ids=["page", "pictures"])
def test_no_text_of_a_chart_is_small(config):
    sizes = [config["axis"]["labelFontSize"], config["axis"]["titleFontSize"], config["text"]["fontSize"]]
    assert min(*sizes, config["title"]["subtitleFontSize"]) == TEXT_SIZE >= 11


class Outline(HTMLParser):
    """The elements of a page with their attributes and ancestors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    """The page of a run with texts, groups and a ledger: every section is there."""
    folder: Path = write_ledger(tmp_path_factory.mktemp("run"), drawn(40, epochs=2))
    rows = 1 + max(line["sample_id"] for line in drawn(40, epochs=2))
    make_scores([float(row) for row in range(rows)], provenance=make_provenance(rows=rows, source={})).save(
        folder / NAME
    )
    texts = [("a question", f"answer {row}") for row in range(rows)]
    report = write_report(read_contents(folder), None, texts, groups=["a", "b"] * (rows // 2), output=folder / "page")
    return Outline(report.path.read_text(encoding="utf-8"))


def test_headings_come_in_order(outline):
    levels = [int(tag[1]) for tag, _, _ in outline.found if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_names_are_unique_and_lead_somewhere(outline):
    ids = [attributes["id"] for _, attributes, _ in outline.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in outline.found:
        named = [attributes.get("aria-labelledby"), attributes.get("aria-describedby"), attributes.get("for")]
        target = attributes.get("href") or ""
        assert {each for each in [*named, target.removeprefix("#")] if each} <= set(ids)


def test_every_control_chart_and_table_has_a_name(outline):
    labelled = {attributes.get("for") for tag, attributes, _ in outline.found if tag == "label"}
    for tag, attributes, ancestors in outline.found:
        if tag in CONTROLS:
            assert "label" in ancestors or attributes.get("id") in labelled, attributes
        if attributes.get("role") in ("img", "region", "search") or tag in ("section", "nav"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby"), attributes
        if "scroll" in (attributes.get("class") or "").split():  # what scrolls can be reached by keyboard
            assert attributes.get("tabindex") == "0"
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")


def test_a_page_has_a_language_landmarks_and_a_way_past_its_head(outline):
    tags = [tag for tag, _, _ in outline.found]
    assert outline.found[0][1]["lang"] == "en"
    assert {"header", "nav", "main", "footer"} <= set(tags)
    links = [attributes for tag, attributes, _ in outline.found if tag == "a"]
    assert links[0] == {"class": "skip", "href": "#h-samples"}

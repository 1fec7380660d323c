"""A page that shows why rows were dropped. Knows scores, selections and text; knows no model and imports no torch.

folder -> Contents -> Numbers, Samples -> charts -> report.html, PNGs, the dropped rows as CSV and Parquet
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import InputError, check_kind, with_known_keywords
from ..config.compatibility import need_extra
from ..io.files import check_folder, replacing
from ..selecting.results import DROPPED_FILE, PAGE
from ..selecting.results import PAGE_FILES as FILES
from .contents import Contents, read_contents
from .dropped import CSV_FILE, save_dropped
from .numbers import Numbers, numbers_of
from .paper_figures import ratios_of, word_frequency
from .samples import Decode, Text, samples_of, shortened
from .timeline import lives_of

__all__ = ["Contents", "Numbers", "Report", "read_contents", "write_report"]

TITLE = "Why rows were dropped"
COUNTED = 20_000  # rows whose words are counted


@dataclass(frozen=True)
class Report:
    """A written report; in a notebook it shows the page.

    Attributes:
        path: the page.
        numbers: the numbers on the page; None where there is only a comparison.
        pictures: the PNG file of each chart.
    """

    path: Path
    numbers: Numbers | None
    pictures: list[Path]

    def _repr_html_(self) -> str:
        """The page in a sandboxed frame, which has no access to the notebook."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        frame = 'sandbox="allow-scripts allow-downloads" style="width:100%;height:900px;border:0"'
        return f'<iframe title="resofilter report" {frame} srcdoc="{page}"></iframe>'


@with_known_keywords
def write_report(
    contents: Contents,
    output: str | os.PathLike[str],
    texts: Sequence[Text] | None = None,
    groups: Sequence[str] | None = None,
    decode: Decode | None = None,
    title: str | None = None,
    ids: Sequence[Any] | None = None,
) -> Report:
    """Write `report.html`, and the charts and all dropped rows to the folder `report` next to it.

    Args:
        contents: the result of `read_contents`, or `Contents(scores, selection)`.
        output: the folder to write to.
        texts: (N,) prompt and completion of every row; iterated once, then indexed by position.
        groups: (N,) the group of each row, such as its source.
        decode: a function from token ids to the text of each; it shows which tokens are learnt.
        title: the title of the page.
        ids: (N,) the user's own id of each row.

    Raises:
        InputError: the number of texts, groups or ids is not the number of rows, the folder cannot be written to, or
            what draws the charts is not installed.
    """
    check_kind("contents", contents, Contents, "the result of read_contents, or Contents(scores, selection)")
    need_extra("report", "A report")
    from .charts import NAMES, figures_of, points_of, ratios_figure
    from .drawing import save_png
    from .page import make_page, shown_note

    output, scores = Path(output), contents.scores
    check_folder(output)
    for what, values in (("texts", texts), ("groups", groups), ("ids", ids)):
        if scores is not None and values is not None and len(values) != len(scores):
            raise InputError(f"There are {len(scores)} rows and {len(values)} {what}: every row needs one.")
    groups, ids = _as_text(groups), _as_text(ids)
    groups = groups and [shortened(each) for each in groups]
    selection = samples = numbers = None
    files = ""
    if scores is None:
        ratios = ratios_of(contents.comparison)
        figures = {"ratios": ratios_figure(ratios)} if ratios else {}
    else:
        selection = contents.decided()
        samples = samples_of(scores, texts, contents.cleaned, decode, ids)
        numbers = numbers_of(contents, groups, _frequency(texts), samples.copies)
        points = points_of(scores, selection.keep, samples.rows)
        figures = figures_of(numbers, points, shown_note(len(samples.rows), len(scores)))
        save_dropped(scores, selection, output / FILES, texts, ids)
        files = f"{FILES}/{CSV_FILE} and {FILES}/{DROPPED_FILE}, next to this page"
    for old in NAMES:  # charts of an earlier report
        (output / FILES / f"{old}.png").unlink(missing_ok=True)
    pictures = [output / FILES / f"{name}.png" for name in figures]
    for shown, picture in zip(figures.values(), pictures, strict=True):
        save_png(shown, picture)
    lives = None if samples is None else lives_of(contents.ledger, samples.rows)
    page = make_page(
        title or TITLE, numbers, figures, scores, selection, samples, groups, contents.epochs, files, lives
    )
    with replacing(output / PAGE) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate becomes a question mark
    return Report(output / PAGE, numbers, pictures)


def _as_text(values: Sequence[Any] | None) -> list[str] | None:
    """(N,) each value as text, "" where there is none; None without values."""
    return None if values is None else ["" if each is None else str(each) for each in values]


def _frequency(texts: Sequence[Text] | None) -> np.ndarray | None:
    """(N,) the word frequency of the completions; of a large dataset that of an even sample, NaN for other rows."""
    if texts is None or not len(texts):
        return None
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), COUNTED)).astype(int))
    found = np.full(len(texts), np.nan)
    found[rows] = word_frequency([texts[row][1] for row in rows.tolist()])
    return found

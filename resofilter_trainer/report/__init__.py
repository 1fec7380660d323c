"""A page that shows why a sample went. Knows scores, selections and text; no model, and imports no torch.

folder -> Contents -> Numbers, Samples -> charts -> report.html, PNGs, the dropped rows as CSV and Parquet
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ..config import InputError
from ..io.files import check_folder, replacing
from ..scores.score_table import ScoreTable
from ..selecting.selection import Selection
from .charts import NAMES, charts_of, points_of, ratios_chart, save_png, specification
from .contents import Contents, read_contents
from .numbers import Numbers, numbers_of, ratios_of, word_frequency
from .page import make_page
from .samples import Decode, Text, cut, samples_of

__all__ = ["Contents", "Numbers", "Report", "read_contents", "write_report"]

FORMULA = tuple("=+-@\t\r")  # begin what a spreadsheet would compute
PAGE, FILES, TITLE = "report.html", "report", "Why a sample went"
COUNTED = 20_000  # rows whose words are counted


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: of the page.
        numbers: that stand on it; None where there is only a comparison.
        pictures: one PNG for each chart.
    """

    path: Path
    numbers: Numbers | None
    pictures: list[Path]

    def _repr_html_(self) -> str:
        """The page inside a notebook, in a frame of its own that can reach nothing of the notebook's."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        frame = 'sandbox="allow-scripts allow-downloads" style="width:100%;height:900px;border:0"'
        return f'<iframe title="resofilter report" {frame} srcdoc="{page}"></iframe>'


def write_report(
    contents: Contents,
    output: str | os.PathLike[str],
    texts: Sequence[Text] | None = None,
    groups: Sequence[str] | None = None,
    decode: Decode | None = None,
    title: str | None = None,
) -> Report:
    """Write `report.html`, and beside it in `report/` the pictures and all dropped rows.

    Args:
        contents: what `read_contents` found, or made by hand of a `ScoreTable` and a `Selection`.
        output: a folder.
        texts: prompt and completion of every row; iterated once, and asked for some rows by their place.
        groups: each row's group, such as its source.
        decode: token ids to the text of each, to show which tokens are learnt.
        title: of the page.

    Raises:
        InputError: there are more or fewer texts or groups than rows, or nothing can be written there.
    """
    output, scores = Path(output), contents.scores
    check_folder(output)
    for what, values in (("texts", texts), ("groups", groups)):
        if scores is not None and values is not None and len(values) != len(scores):
            raise InputError(f"There are {len(scores)} rows and {len(values)} {what}: every row needs one.")
    groups = None if groups is None else [cut(str(each)) for each in groups]
    selection = samples = numbers = None
    files = ""
    if scores is None:
        ratios = ratios_of(contents.comparison)
        charts = {"ratios": specification(ratios_chart(ratios))} if ratios else {}
    else:
        selection = contents.decided()
        samples = samples_of(scores, texts, contents.cleaned, decode)
        numbers = numbers_of(contents, groups, _frequency(texts), samples.copies)
        charts = charts_of(numbers, points_of(scores, selection.keep, samples.rows))
        files = _save_dropped(scores, selection, output / FILES)
    for old in NAMES:  # of an earlier page
        (output / FILES / f"{old}.png").unlink(missing_ok=True)
    pictures = [output / FILES / f"{name}.png" for name in charts]
    for chart, picture in zip(charts.values(), pictures, strict=True):
        save_png(chart, picture)
    page = make_page(title or TITLE, numbers, charts, scores, selection, samples, groups, contents.epochs, files)
    with replacing(output / PAGE) as part:
        part.write_bytes(page.encode("utf-8", "replace"))  # half a surrogate pair becomes a question mark
    return Report(output / PAGE, numbers, pictures)


def _frequency(texts: Sequence[Text] | None) -> np.ndarray | None:
    """(N,) how common each row's words are; of some rows, evenly spread, where there are many."""
    if texts is None or not len(texts):
        return None
    rows = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), COUNTED)).astype(int))
    found = np.full(len(texts), np.nan)
    found[rows] = word_frequency([texts[row][1] for row in rows.tolist()])
    return found


def _save_dropped(scores: ScoreTable, selection: Selection, folder: Path) -> str:
    """Write every row that goes, with its scores and its reason; how people find it."""
    gone = np.flatnonzero(~selection.keep)
    columns = {name: scores.table[name] for name in scores.table.column_names if name != "reason"}
    table = pa.table({**columns, "reason": pa.array(list(selection.reason), pa.string())}).take(gone)
    with replacing(folder / "dropped.parquet") as part:
        pyarrow.parquet.write_table(table, part)
    with replacing(folder / "dropped.csv") as part:
        named = [f"'{why}" if why[:1] in FORMULA else why for why in table["reason"].to_pylist()]
        place = table.column_names.index("reason")
        pyarrow.csv.write_csv(table.set_column(place, "reason", pa.array(named, pa.string())), part)
    return f"{FILES}/dropped.csv and {FILES}/dropped.parquet, beside this page"

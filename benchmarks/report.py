"""A report on many rows: its time and memory, the size of the page, and the time until a browser has drawn it.

python benchmarks/report.py --rows 400000 --json report.json

synthetic scores and texts -> write_report -> bytes -> headless Chromium, if installed -> seconds until it is drawn

python benchmarks/report.py --picture resofilter-demo/seed-0/report.html    # the picture in README
python benchmarks/report.py --axe node_modules/axe-core/axe.min.js PAGE ... # `npm install axe-core`, in any folder

counts the rules of axe that a page passes and violates, at 1400 and 420 px, in both themes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from resofilter_trainer import DataSelector, Provenance, ScoreTable
from resofilter_trainer.report import Contents, write_report

PICTURE = Path(__file__).with_name("report.png")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WORDS = [f"word{i}" for i in range(5000)]


class Texts(Sequence[tuple[str, str]]):
    """Prompts of 60 and completions of 120 words, made on access."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.pool = np.random.default_rng(1).integers(0, len(WORDS), 1 << 20)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: Any) -> Any:
        start = int(row) * 181 % (len(self.pool) - 200)
        words = [WORDS[i] for i in self.pool[start : start + 180]]
        return " ".join(words[:60]), " ".join([*words[60:], str(row)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (self[row] for row in range(self.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4_000, 40_000, 400_000])
    parser.add_argument("--output", type=Path, help="a folder for the last page")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a page whose beginning becomes benchmarks/report.png")
    parser.add_argument("--axe", type=Path, nargs="+", metavar="PATH", help="axe.min.js, and pages to check with it")
    args = parser.parse_args()
    if args.picture or args.axe:
        with browser() as chromium:
            if args.picture:
                save_picture(chromium, args.picture)
            for page in (args.axe or [])[1:]:
                check_page(chromium, args.axe[0], page)
        return
    found = []
    print("| rows | seconds | page, MB | folder, MB | peak memory, MB | browser, s |\n|---|---|---|---|---|---|")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            output = args.output or Path(folder)
            found.append(measure(rows, output))
        line = found[-1]
        print(
            "| " + " | ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in line.values()) + " |"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(rows: int, output: Path) -> dict[str, int | float | None]:
    """Write one report and measure it."""
    scores = synthetic(rows)
    groups = [f"source {row % 7}" for row in range(rows)]
    began = time.perf_counter()
    report = write_report(Contents(scores, DataSelector().select(scores)), output, Texts(rows), groups)
    seconds = time.perf_counter() - began
    unit = 1024 if sys.platform == "linux" else 1
    files = [path for path in output.rglob("*") if path.is_file()]
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "page": round(report.path.stat().st_size / 1e6, 1),
        "folder": round(sum(path.stat().st_size for path in files) / 1e6, 1),
        "memory": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6),
        "browser": opened(report.path),
    }


def synthetic(rows: int) -> ScoreTable:
    """Scores that saturate, as AdamW's do, and that depend on loss and slightly on length."""
    random = np.random.default_rng(0)
    tokens, loss = random.integers(5, 400, rows), random.gamma(2, 0.5, rows)
    score = 1e-5 * (1 - np.exp(-2 * loss - 0.003 * tokens + 0.3 * random.normal(size=rows)) * 0.3)
    provenance = Provenance(
        model="synthetic",
        weights="",
        tokenizer="",
        template="",
        dataset="",
        rows=rows,
        config={"update": "adamw", "norm": "mean_abs", "n_layers": 3, "lr": 1e-5},
        preparation={"max_length": 512},
        versions={},
    )
    columns = {"sample_id": np.arange(rows), "score": score, "loss": loss, "num_tokens": tokens, "length": tokens + 80}
    return ScoreTable(pa.table({**columns, "reason": pa.nulls(rows, pa.string())}), provenance)


def opened(path: Path) -> float | None:
    """Seconds until a headless browser has drawn the page, without the browser's start; None without a browser."""
    if not any(map(shutil.which, BROWSERS)):
        return None
    with browser() as chromium:
        page = chromium.new_page()
        began = time.perf_counter()
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("html[data-drawn]")
        return round(time.perf_counter() - began, 2)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def save_picture(chromium: Any, path: Path) -> None:
    """Save the beginning of a page as the picture in README."""
    page = chromium.new_page(viewport={"width": 1100, "height": 1120})
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]")
    page.screenshot(path=PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")


def check_page(chromium: Any, axe: Path, path: Path) -> None:
    """Print how many of axe's rules a page passes and violates, and which; rules weigh alike."""
    for width, theme in itertools.product((1400, 420), ("light", "dark")):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        page.goto(path.resolve().as_uri())
        page.wait_for_load_state("networkidle")
        if page.locator("script#data").count():  # a report
            page.wait_for_selector("html[data-drawn]")
            page.locator("details > summary").evaluate_all("all => all.forEach(each => each.click())")
            page.locator("#samples tbody button").evaluate_all("all => all[0] && all[0].click()")
        page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run({ resultTypes: ['violations'] })")
        passed, violated = len(found["passes"]), [each["id"] for each in found["violations"]]
        share = 100 * passed / (passed + len(violated))
        print(
            f"{path} {width} px {theme}: {share:.0f} ({passed} rules passed; violated: {', '.join(violated) or 'none'})"
        )
        page.close()


if __name__ == "__main__":
    main()

"""The pages say what the code says: selectors, refusals, columns, public names, settings that are shown elsewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from helpers.sources import modules
from helpers.tables import make_scores

import resofilter_trainer
from resofilter_trainer.compare.methods import METHODS
from resofilter_trainer.criteria.criterion import CRITERIA

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    """docs/criterion_pages.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("criterion_pages", DOCS / "criterion_pages.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_selector_has_a_page_as_the_tables_of_the_code_say(pages):
    """Otherwise run `python docs/criterion_pages.py`."""
    assert sorted(name for page in pages.PAGES for name in page.methods) == sorted(METHODS.keys() - pages.LEFT_OUT)
    assert {page.criterion for page in pages.PAGES} - {"", "resonance"} == {*CRITERIA} - {"perplexity"}
    written = pages.written()
    assert {path: path.read_text() for path in written} == written
    assert {*(DOCS / "criteria").iterdir()} == {*written} - {DOCS / "selectors.md"}


def test_the_end_that_goes_first_is_that_of_the_scores(pages):
    """Of the three methods whose criterion is not in CRITERIA, too."""
    source = (ROOT / "resofilter_trainer" / "compare" / "method_scores.py").read_text()
    assert source.count('drop="smallest"') + source.count('"drop": "smallest"') == len(pages.ENDS)


def test_numbers_of_the_selectors_are_found_in_the_results(pages):
    tables = pages.tables()
    assert tables["40% wrong"]["resonance"][1] == "+0.099 [+0.043, +0.155]"
    assert {*tables["No wrong rows"]} == METHODS.keys() - pages.LEFT_OUT - {"full", "random", "perplexity"}


def said(node: ast.AST) -> str:
    """A text in the source, with … for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(each) if isinstance(each, ast.Constant) else "…" for each in node.values)
    return f"{said(node.left)}{said(node.right)}" if isinstance(node, ast.BinOp) else "…"


def texts_of_the_code() -> Iterator[str]:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and (text := said(node)) != "…":
                yield text


def test_messages_of_the_page_of_trouble_are_the_codes_own():
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 40
    texts = set(texts_of_the_code())
    whole = "\n".join(texts)
    plain = re.sub(r"…+", "…", whole)
    assert [message for message, _ in rows if re.sub(r"…+", "…", message).rstrip("… ") not in plain] == []


def test_columns_of_files_are_those_that_are_written(tmp_path):
    text = (DOCS / "file_formats.md").read_text()
    named = {
        heading: re.findall(
            r"^\| `([^`]+)` \| (\w+) \|", text.split(f"### {heading}")[1].split("\n## ")[0], re.MULTILINE
        )
        for heading in ("scores.parquet", "selection.parquet")
    }
    scores = make_scores([0.0, 1.0, 2.0, 3.0])
    selection = resofilter_trainer.DataSelector().select(scores)
    schema = pq.read_schema(selection.save(tmp_path))
    assert named["selection.parquet"] == [(each.name, str(each.type)) for each in schema]
    schema = pq.read_schema(scores.save(tmp_path))
    found = {(re.sub(r"layer_\d+", "layer_<i>", each.name), str(each.type)) for each in schema}
    assert found <= {*named["scores.parquet"]}


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    found = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", text, flags=re.MULTILINE)
    assert sorted(found) == sorted(resofilter_trainer.__all__)


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == resofilter_trainer.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_measured_lines_of_the_readme_are_in_the_pages():
    readme = (ROOT / "README.md").read_text().split("## What was measured")[1].split("\n## ")[0]
    rows = [line for line in readme.splitlines() if line.startswith("| ") and line != "| | |"]
    assert len(rows) == 6
    page = (DOCS / "reading_results.md").read_text()
    assert [row for row in rows if row not in page] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(name):
    """Those of the site are checked when it is built."""
    links = re.findall(r"\[[^\]]+\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []

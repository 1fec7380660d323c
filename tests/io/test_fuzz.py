"""A reader returns what was written or refuses the file in one line, whatever it contains; nothing in it is run."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.shards import files as files_of_rows
from helpers.sources import modules
from helpers.stores import filled
from helpers.tables import make_provenance, make_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resofilter_trainer.cli import entry as cli
from resofilter_trainer.cli import inputs
from resofilter_trainer.cli.settings_file import yaml_arguments
from resofilter_trainer.compare.config import ComparisonConfig
from resofilter_trainer.compare.run import read_cell
from resofilter_trainer.config import InputError
from resofilter_trainer.io import table_digest
from resofilter_trainer.io.store import MANIFEST, part_paths, read_manifest
from resofilter_trainer.report.contents import Contents, read_contents
from resofilter_trainer.scores.joined_file import join_scores
from resofilter_trainer.scores.score_table import SCORES_FILE, ScoreTable
from resofilter_trainer.scores.token_scores import TOKEN_SCORES_FILE, TokenScores
from resofilter_trainer.selecting.data_selector import DataSelector
from resofilter_trainer.selecting.results import COMPARISON_FILE, LOG_FILE, SUMMARY_FILE
from resofilter_trainer.selecting.selection import SELECTION_FILE, Selection
from resofilter_trainer.selecting.streamed import select_file
from resofilter_trainer.training.fine_tuning import check_settings
from resofilter_trainer.training.measurements import FILE as MEASUREMENTS_FILE
from resofilter_trainer.training.measurements import Measurements

HOW_MANY = pytest.mark.parametrize("examples", [25, pytest.param(250, marks=pytest.mark.slow)])
EXAMPLES = settings(deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
SCORES = make_scores([3.0, 1.0, None, 2.0, 5.0, 4.0])
SUMMARY = {"keep_tokens": 0.5, "ranking": "global"}
COMPARISON_YAML = """
selectors: [full, random, {method: loss, name: mine}]
keep: [0.5, 0.25]
seeds: [0]
demo: {rows: 20, wrong_share: 0.25}
training: {learning_rate: 2e-5, max_steps: 3}
"""
CLI_YAML = "model: tiny\ndataset: rows.jsonl\noutput: out\nn_layers: 2\ndrop_empty: true\n"
LINE = {"selector": "loss", "model": "m", "keep": 0.5, "metric": 0.1, "metric_low": 0.0, "metric_high": 0.2}


def token_scores() -> TokenScores:
    offsets, base = np.array([0, 2, 2, 5]), np.linspace(0, 1, 5, dtype=np.float32)
    tokens = np.arange(5, dtype=np.int32)
    return TokenScores(np.array([0, 3, 5]), offsets, tokens, tokens, base, base[::-1].copy(), make_provenance())


def make_folder(folder: Path) -> None:
    """One file of each kind that the package reads."""
    SCORES.save(folder)
    DataSelector().select(SCORES).save(folder)
    token_scores().save(folder)
    join_scores([each.save(folder / "shards" / f"{i}") for i, each in enumerate(files_of_rows())], folder / JOINED)
    Measurements(6, [2, 3]).save(folder, {"order": np.arange(6)})
    plain = {
        SUMMARY_FILE: SUMMARY,
        LOG_FILE: [{"loss": 1.0, "step": 1}],
        COMPARISON_FILE: {"lines": [LINE]},
        "settings.json": SUMMARY,
        "cell.json": {"of": {}},
    }
    for name, value in plain.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "comparison.yaml").write_text(COMPARISON_YAML)
    (folder / "score.yaml").write_text(CLI_YAML)
    filled(folder, 2)


def read_page(folder: Path) -> Contents:
    contents = read_contents(folder)
    contents.decided()
    return contents


def read_store(folder: Path) -> None:
    for call in (filled(folder, 0).done, filled(folder, 0).lines):
        call()


def read_pieces(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        select_file(folder / JOINED, place)


def read_arguments(folder: Path) -> None:
    args = cli._parser().parse_args(["score", "--config", str(folder / "score.yaml")])
    yaml_arguments(args)


JOINED = f"joined/{SCORES_FILE}"
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {  # the file and its reader
    "scores": (SCORES_FILE, ScoreTable.load),
    "selection": (SELECTION_FILE, Selection.load),
    "joined scores": (JOINED, lambda folder: ScoreTable.load(folder / JOINED)),
    "scores in pieces": (JOINED, read_pieces),
    "token scores": (TOKEN_SCORES_FILE, TokenScores.load),
    "measurements": (MEASUREMENTS_FILE, Measurements.load),
    "manifest": (f"parts/{MANIFEST}", lambda folder: read_manifest(folder / "parts")),
    "store": (f"parts/{MANIFEST}", read_store),
    "part": ("parts/part", read_store),
    "report on scores": (SCORES_FILE, read_page),
    "report on a selection": (SELECTION_FILE, read_page),
    "report on tokens": (TOKEN_SCORES_FILE, read_page),
    "report on a summary": (SUMMARY_FILE, read_page),
    "report on a log": (LOG_FILE, read_page),
    "report on a comparison": (COMPARISON_FILE, read_page),
    "settings": ("settings.json", lambda folder: check_settings(folder / "settings.json", SUMMARY)),
    "cell": ("cell.json", lambda folder: read_cell(folder / "cell.json", {})),
    "comparison": ("comparison.yaml", lambda folder: ComparisonConfig.load(folder / "comparison.yaml")),
    "arguments": ("score.yaml", read_arguments),
}
TABLES = [name for name in READERS if READERS[name][0].endswith((".parquet", ".arrow"))]


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place))
        yield Path(place)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    shutil.copytree(made, tmp_path / "in", dirs_exist_ok=True)
    return tmp_path / "in"


def target(folder: Path, name: str) -> Path:
    file = READERS[name][0]
    return part_paths(folder / "parts")[0] if file == "parts/part" else folder / file


def one_line(call: Callable[[], object]) -> object:
    """The result; None if the call is refused in one line."""
    said = ["why"]
    with contextlib.suppress(InputError):
        try:
            return call()
        except InputError as error:
            said = str(error).splitlines()
            raise
    assert len(said) == 1
    return None


def survives(folder: Path, name: str, content: bytes) -> object:
    """Read the file with this content: no error but InputError, and no other file, may come of it."""
    path = target(folder, name)
    whole, around = path.read_bytes(), {each for each in folder.parent.rglob("*") if "parts" not in each.parts}
    path.write_bytes(content)
    try:
        return one_line(lambda: READERS[name][1](folder))
    finally:
        path.write_bytes(whole)
        assert {each for each in folder.parent.rglob("*") if "parts" not in each.parts} == around


MUTATION = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "repeat"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8),
)


def mutated(whole: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """With some bytes changed, removed, inserted or repeated; places are shares of the length."""
    for kind, one, two, new in changes:
        start, stop = sorted((int(one * len(whole)), int(two * len(whole))))
        if kind == "flip":
            whole = whole[:start] + bytes(a ^ b for a, b in zip(whole[start:], new, strict=False)) + (
                whole[start + len(new) :]
            )  # fmt: skip
        elif kind == "cut":
            whole = whole[:start] + whole[min(stop, start + 64) :]
        elif kind == "insert":
            whole = whole[:start] + new + whole[start:]
        else:
            whole = whole[:stop] + whole[start : min(stop, start + 256)] + whole[stop:]
    return whole


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name, folder):
    if name != "cell":
        READERS[name][1](folder)


@HOW_MANY
@pytest.mark.parametrize("name", READERS)
def test_random_bytes_are_refused_in_one_line(name, examples, folder):
    @settings(EXAMPLES, max_examples=examples)
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))))
    def check(content):
        survives(folder, name, content)

    check()


@HOW_MANY
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused_in_one_line(name, examples, folder):
    whole = target(folder, name).read_bytes()

    @settings(EXAMPLES, max_examples=examples)
    @given(st.lists(MUTATION, min_size=1, max_size=4))
    def check(changes):
        survives(folder, name, mutated(whole, changes))

    check()


@pytest.mark.parametrize("name", [name for name in READERS if name != "cell"])  # only read if it exists
@pytest.mark.parametrize("change", ["missing", "a folder", "a broken link"])
def test_a_missing_file_is_refused_in_one_line(change, name, folder):
    path = target(folder, name)
    path.unlink()
    if change == "a folder":
        path.mkdir()
    elif change == "a broken link":
        path.symlink_to(folder / "nowhere")
    one_line(lambda: READERS[name][1](folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["global", "full"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3) | st.sampled_from(
            ["format", "made_of", "keep_tokens", "ranking", "lines", "of", "selectors", "method", "keep", "seeds",
             "model", "demo", "rows", "training", "output", "tasks", "settings", "name", "trust", "policy",
             "provenance", "keep_of_groups", "config"]
        ), inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@HOW_MANY
@pytest.mark.parametrize("name", [name for name in READERS if name not in [*TABLES, "part"]])
def test_any_sound_json_is_read_or_refused_in_one_line(name, examples, folder):
    @settings(EXAMPLES, max_examples=examples)
    @given(JSON)
    def check(value):
        survives(folder, name, json.dumps(value).encode())

    check()


COLUMN = st.sampled_from([
    pa.array([0, 1, 2, 3, 4, 5]), pa.array([0, None, 2, 3, 4, 5]), pa.array([0.5] * 6), pa.array([None] * 6),
    pa.array([True] * 6), pa.array(["kept"] * 6), pa.array(["kept", None] * 3), pa.array([b"x"] * 6),
    pa.array([[1]] * 6), pa.array([{"a": 1}] * 6), pa.array([2**62] * 6), pa.array([-1] * 6),
    pa.array(["a", "b"] * 3).dictionary_encode(), pa.array([0] * 6, pa.timestamp("ns")), pa.array([1] * 6, pa.uint8()),
    pa.array([[0.5]] * 6, pa.large_list(pa.float32())), pa.array([[1], None] * 3, pa.large_list(pa.int32())),
    pa.array([0] * 6, pa.decimal128(5)), pa.array(["x"] * 6, pa.large_string()), pa.array([0.5] * 6, pa.float16()),
])  # fmt: skip


def rewritten(table: pa.Table, path: Path, metadata: dict[bytes, bytes]) -> bytes:
    """The bytes of a file of the same kind, with or without the right digest."""
    table = table.replace_schema_metadata(metadata)
    table = table_digest.with_digest(table) if len(metadata) % 2 else table
    with tempfile.TemporaryDirectory() as place:
        other = Path(place) / "x"
        if path.suffix == ".parquet":
            pq.write_table(table, other)
        else:
            with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        return other.read_bytes()


@HOW_MANY
@pytest.mark.parametrize("name", [name for name in TABLES if not name.startswith("report")])
def test_tables_with_other_columns_or_metadata_are_read_or_refused_in_one_line(name, examples, folder):
    path = target(folder, name)
    sound = (pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(str(path)).read_all()).slice(0, 6)
    key, text = next(item for item in sound.schema.metadata.items() if item[0] != table_digest.DIGEST)
    values = json.loads(text)

    @settings(EXAMPLES, max_examples=examples)
    @given(st.data())
    def check(data):
        table = sound
        for column in data.draw(st.lists(st.sampled_from(sound.column_names), max_size=3)):
            if column in table.column_names:
                place, kind = table.column_names.index(column), data.draw(st.sampled_from(["drop", "other", "twice"]))
                new = data.draw(COLUMN)[: table.num_rows]
                if kind == "drop":
                    table = table.remove_column(place)
                elif len(new) == table.num_rows:
                    table = (
                        table.append_column(column, new) if kind == "twice" else table.set_column(place, column, new)
                    )
        metadata = {key: text}
        if data.draw(st.booleans()):
            changed = data.draw(JSON)
            if isinstance(values, dict) and data.draw(st.booleans()):
                changed = {**values, data.draw(st.sampled_from(sorted(values))): changed}
            metadata = {key: json.dumps(changed).encode()}
        if data.draw(st.booleans()):
            metadata[b"other"] = b"\xff"
        if not table.num_columns:
            return
        found = survives(folder, name, rewritten(table, path, metadata))
        if isinstance(found, ScoreTable):
            assert (found.scored | np.isnan(found.column("score"))).shape == (table.num_rows,)
        if isinstance(found, Selection):
            assert found.keep.dtype == bool
            assert all(isinstance(each, str) for each in found.reason)

    check()


ODD_YAML = ["2001-99-99", "!!bool x", "!!int x", "!!timestamp x", "!!float ''", "? {a: b}\n: c", "&a [*a]",
            "!!python/object/apply:os.system [true]", "[" * 5000, "1:99:99", "!!binary x", "\x00",
            "a: &a {b: *a}", "é: \xff",
            "selectors: [{method: loss, name: ../../evil}]", "selectors: [{method: loss, name: .evil}]",
            "selectors: full\nmodel: ..", "selectors: full\n\"a\\nb\": 1"]  # fmt: skip


@pytest.mark.parametrize("text", ODD_YAML)
@pytest.mark.parametrize("name", ["comparison", "arguments"])
def test_odd_yaml_is_refused_in_one_line(name, text, folder):
    path = target(folder, name)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as refused:
        READERS[name][1](folder)
    assert "\n" not in str(refused.value)


# ---- nothing of a file is run


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    nodes = [(file, node) for file, path in modules().items() for node in ast.walk(ast.parse(path.read_text()))]
    return [(file, ast.unparse(node.func), node) for file, node in nodes if isinstance(node, ast.Call)]


def test_no_file_is_unpickled_or_run():
    assert len(calls()) > 1000  # else nothing was looked at
    names = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    for file, path in modules().items():
        text = path.read_text()
        if file == "data.shared_rows":  # which copies what is in memory, and reads no file by it
            assert text.count("pickle.loads(") == text.count("pickle.loads(pickle.dumps(")
            text = text.replace("import pickle\n", "")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "")}
                assert not names & {each.split(".")[0] for each in found}, file
    for file, name, node in calls():
        given_ = {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), file
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"), file
        assert name != "torch.load" or given_.get("weights_only") == "True", file
        assert name != "np.load" or given_.get("allow_pickle", "False") == "False", file
        assert given_.get("shell", "False") == "False", file


def test_code_of_a_model_runs_only_where_it_is_asked_for():
    for command in ("score", "clean"):
        assert cli._parser().parse_args([command]).trust_remote_code is False
    for file, name, node in calls():
        for each in node.keywords:
            if each.arg == "trust_remote_code":
                said = ast.unparse(each.value)
                assert said == "False" or said.endswith("args.trust_remote_code") or said == "trust", (file, name)
    for file, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own = dict(zip([each.arg for each in node.args.args[::-1]], node.args.defaults[::-1], strict=False))
                own |= dict(zip([each.arg for each in node.args.kwonlyargs], node.args.kw_defaults, strict=True))
                default: Any = own.get("trust_remote_code")
                assert default is None or ast.unparse(default) == "False", file
    from resofilter_trainer.data.loading import default_arguments

    assert default_arguments().trust_remote_code is False
    assert "trust_remote_code=args.trust_remote_code" in inspect.getsource(inputs)

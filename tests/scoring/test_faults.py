"""Full disks, damaged files, kills, other runs, wrong clocks: a helpful error of one line, no loss, the same scores."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.scoring import COLUMNS, ROWS, arguments
from helpers.tables import make_scores

from resofilter_trainer import InputError, ScoreTable, TokenCleaning, clean_dataset, score_by, score_dataset
from resofilter_trainer.io.files import check_folder
from resofilter_trainer.io.table_digest import DIGEST
from resofilter_trainer.scores.score_table import KEY, SCORES_FILE
from resofilter_trainer.scores.token_scores import TOKEN_SCORES_FILE
from resofilter_trainer.scoring import passes

FORK = multiprocessing.get_context("fork")  # the child does not import everything again
TOKENS = 100  # per batch, so that there are several batches
Run = Callable[[Path, list[dict[str, str]]], Any]


@pytest.fixture(autouse=True)
def every_batch_is_a_part(monkeypatch):
    monkeypatch.setattr(passes, "LEAST_LOST", 0.0)
    monkeypatch.setattr(passes, "LOST_SHARE", 0.0)
    monkeypatch.setattr(passes, "GATHERED", 0.0)


@pytest.fixture(scope="module")
def reference(tiny_llama, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reference")
    tiny_llama(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tiny_llama, tokenizer, reference) -> dict[str, tuple[Run, str]]:
    """By name a pass that writes to a folder, and the file that it writes."""
    quiet, cleaning = arguments(disable_tqdm=True), TokenCleaning(0.5, reference, tokens_per_batch=TOKENS)

    def resonance(output: Path, rows: list[dict[str, str]]) -> Any:
        model, dataset = tiny_llama(), Dataset.from_list(rows)
        return score_dataset(model, dataset, tokenizer, quiet, output=output, tokens_per_batch=TOKENS, **COLUMNS)

    def by_loss(output: Path, rows: list[dict[str, str]]) -> Any:
        model, dataset = tiny_llama(), Dataset.from_list(rows)
        return score_by("loss", model, dataset, tokenizer, quiet, output, tokens_per_batch=TOKENS, **COLUMNS)

    def clean(output: Path, rows: list[dict[str, str]]) -> Any:
        return clean_dataset(tiny_llama(), Dataset.from_list(rows), cleaning, tokenizer, quiet, output, **COLUMNS)

    files = {"resonance": SCORES_FILE, "loss": SCORES_FILE, "clean": TOKEN_SCORES_FILE}
    return {name: (run, files[name]) for name, run in zip(files, (resonance, by_loss, clean), strict=True)}


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> dict[str, bytes]:
    """The bytes that each pass writes when nothing happens."""
    found = {}
    for name, (run, file) in runs.items():
        folder = tmp_path_factory.mktemp(name)
        run(folder, ROWS)
        found[name] = (folder / file).read_bytes()
    return found


NAMES = ("resonance", "loss", "clean")


def names(slow: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in NAMES]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def interrupted(call: Callable[[], object], at: int, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, at)
        with pytest.raises(KeyboardInterrupt):
            call()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinished(folder: Path) -> list[str]:
    return [name for name in everything(folder) if ".part" in name or ".writing-" in name]


def told(work: Callable[[], object]) -> str:
    """The result of work in a child process: "done", the message of an InputError, or another error with its name."""
    ours, theirs = FORK.Pipe(duplex=False)

    def run() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, not pytest's files, whose size is limited, too
        try:
            work()
            theirs.send("done")
        except InputError as error:
            theirs.send(str(error))
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")

    child = FORK.Process(target=run)
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join(60)


def interrupt_at(monkeypatch, number: int) -> None:
    """Interrupt a pass that has measured `number` batches and added one less to its results."""
    real, count = passes._Results.add, [0]

    def add(self: Any, unit: int, results: pa.Table) -> None:
        count[0] += 1
        if count[0] == number:
            raise KeyboardInterrupt
        real(self, unit, results)

    monkeypatch.setattr(passes._Results, "add", add)


# ---- interrupted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_interrupted_at_any_batch_resumes_to_the_same_bytes(name, runs, undisturbed, tmp_path, monkeypatch):
    run, file = runs[name]
    for number in range(1, 100):
        with monkeypatch.context() as patched:
            interrupt_at(patched, number)
            try:
                run(tmp_path / str(number), ROWS)
                break
            except KeyboardInterrupt:
                assert not (tmp_path / str(number) / file).exists()
        run(tmp_path / str(number), ROWS)
        assert (tmp_path / str(number) / file).read_bytes() == undisturbed[name], number
    assert 4 < number < 99


@pytest.mark.parametrize("name", names(slow=("resonance",)))
def test_a_pass_interrupted_after_each_batch_writes_the_same_bytes(name, runs, undisturbed, tmp_path, monkeypatch):
    run, file = runs[name]
    starts = 0
    while not (tmp_path / file).exists():
        starts += 1
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            interrupt_at(patched, 2)
            run(tmp_path, ROWS)
        assert unfinished(tmp_path) == []
    assert 4 < starts < 99
    assert (tmp_path / file).read_bytes() == undisturbed[name]
    assert not (tmp_path / "parts").exists()


# ---- full disks


@pytest.mark.parametrize("name", names(slow=("resonance", "clean")))
def test_a_pass_names_a_full_disk_and_resumes_when_there_is_room(name, runs, undisturbed, tmp_path):
    run, file = runs[name]

    def limited(most: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel's EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        run(tmp_path, ROWS)

    said = []
    for most in (0, 100, 500, 1000, 2000, 3000, 4000, 6000, 8000, 12_000, 20_000, 40_000, 80_000):
        said.append(told(lambda most=most: limited(most)))
        if said[-1] == "done":
            break
        assert "cannot be written (File too large): what was there before is untouched. Make room" in said[-1], most
        assert str(tmp_path) in said[-1]
        assert "\n" not in said[-1]
        assert unfinished(tmp_path) == []
        assert not (tmp_path / file).exists() or name == "clean"
    assert said[-1] == "done"
    assert len(said) > 4
    assert (tmp_path / file).read_bytes() == undisturbed[name]


@pytest.mark.parametrize("name", names(slow=("resonance", "clean")))
@pytest.mark.parametrize(("where", "what"), [(os, "replace"), (os, "fsync"), (pq, "write_table"), (Path, "write_text")])
def test_whatever_the_disk_refuses_a_pass_resumes_when_there_is_room(
    where, what, name, runs, undisturbed, tmp_path, monkeypatch
):
    run, file = runs[name]
    real, said = getattr(where, what), []
    for number in range(1, 60, 4):
        count = [0]

        def full(*args: Any, count: list[int] = count, number: int = number, **options: Any) -> Any:
            count[0] += 1
            if count[0] >= number and (what == "fsync" or str(tmp_path) in f"{args}"):  # and from then on
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(where, what, full)
            try:
                run(tmp_path, ROWS)
            except InputError as error:
                said.append(str(error))
            except OSError:
                assert (name, what) == ("clean", "replace")  # the old dataset is gone by then, the scores are there
                assert (tmp_path / file).exists()
            else:
                break
        assert unfinished(tmp_path) == []
    assert said
    assert all("(No space left on device)" in text and "\n" not in text for text in said)
    run(tmp_path, ROWS)
    assert (tmp_path / file).read_bytes() == undisturbed[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_measured(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "measure_batches", None)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        assert str(tmp_path) in refusal(lambda output=output: runs[name][0](output, ROWS))
    assert everything(tmp_path) == {"file": b"mine"}


def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "Choose another output" in refusal(lambda: check_folder(tmp_path / "new"))


# ---- damaged scores


def variants(whole: bytes, count: int) -> list[bytes]:
    """The file with one bit flipped, or truncated."""
    chance, found = random.Random(0), []
    for _ in range(count):
        at = chance.randrange(len(whole))
        found.append(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
    return [*found, *(whole[: chance.randrange(len(whole))] for _ in range(count // 4))]


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_or_changes_nothing(runs, tmp_path):
    truth = runs["resonance"][0](tmp_path, ROWS)
    path, noticed = tmp_path / SCORES_FILE, []
    tables = variants(path.read_bytes(), 1200)
    for each in tables:
        path.write_bytes(each)
        try:
            found = ScoreTable.load(path)
        except InputError as error:
            noticed.append(str(error))
        else:
            assert found.table.equals(truth.table)
            assert found.provenance == truth.provenance
    assert len(noticed) > len(tables) / 2
    assert all(str(path) in text and "\n" not in text for text in noticed)


def test_damaged_scores_are_not_silently_measured_again(runs, undisturbed, tmp_path):
    whole = undisturbed["loss"]
    for content in (whole[:-1], whole[: len(whole) // 2], b""):
        (tmp_path / SCORES_FILE).write_bytes(content)
        text = refusal(lambda: runs["loss"][0](tmp_path, ROWS))
        assert f"'{tmp_path / SCORES_FILE}' cannot be read: it is truncated, damaged or" in text
        assert text.endswith("Make it again.")
        assert (tmp_path / SCORES_FILE).read_bytes() == content


def test_a_page_whose_checksum_was_forged_is_noticed(tmp_path):
    """As if another program had written it: the metadata are ours, a value is not."""
    path = make_scores([1.0, 2.0, None]).save(tmp_path)
    table = pq.read_table(path)
    for name, values in (("score", [1.0, 2.5, None]), ("score", [1.0, 2.0, 3.0]), ("reason", [None, "", "x"])):
        place = table.column_names.index(name)
        other = table.set_column(place, name, pa.array(values, table[name].type))
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
        assert "its content is not what was written" in refusal(lambda: ScoreTable.load(path))
    for other in (table.rename_columns(["sample_id", "loss", "score", *table.column_names[3:]]), table.slice(1)):
        pq.write_table(other.replace_schema_metadata(table.schema.metadata), path)
        assert "its content is not what was written" in refusal(lambda: ScoreTable.load(path))
    pq.write_table(table, path, row_group_size=1, compression="none")  # the same, written in another way
    assert ScoreTable.load(path).table.equals(table)


def test_scores_of_an_earlier_version_without_a_digest_are_read(tmp_path):
    scores = make_scores([1.0, 2.0, None])
    path = scores.save(tmp_path)
    table = pq.read_table(path)
    assert DIGEST in table.schema.metadata
    pq.write_table(table.replace_schema_metadata({KEY: scores.provenance.to_json()}), path)
    assert ScoreTable.load(path).table.equals(scores.table)


# ---- other runs


def paused(run: Run, folder: Path, at: int, monkeypatch) -> tuple[Any, Any, Any]:
    """A run in another process that pauses before it adds a batch to its results; `go` lets it continue."""
    waits, go = FORK.Event(), FORK.Event()
    real, count = passes._Results.add, [0]

    def add(self: Any, unit: int, results: pa.Table) -> None:
        count[0] += 1
        if count[0] == at:
            waits.set()
            go.wait(60)
        real(self, unit, results)

    def work() -> None:
        monkeypatch.setattr(passes._Results, "add", add)
        run(folder, ROWS)

    child = FORK.Process(target=work)
    child.start()
    assert waits.wait(60)
    return child, go, waits


@pytest.mark.parametrize("name", NAMES)
def test_of_two_runs_to_one_folder_the_second_is_refused_and_the_first_ends(
    name, runs, undisturbed, tmp_path, monkeypatch
):
    run, file = runs[name]
    child, go, _ = paused(run, tmp_path, 4, monkeypatch)
    before = everything(tmp_path)
    for _ in range(2):
        text = refusal(lambda: run(tmp_path, ROWS))
        assert text.startswith(f"Another run writes to '{tmp_path}'. Wait until it ends, stop it")
    assert everything(tmp_path) == before
    go.set()
    child.join(60)
    assert child.exitcode == 0
    assert (tmp_path / file).read_bytes() == undisturbed[name]


@pytest.mark.parametrize("name", names(slow=("resonance", "clean")))
@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_run_leaves_no_lock(at, name, runs, undisturbed, tmp_path, monkeypatch):
    run, file = runs[name]
    child, _, _ = paused(run, tmp_path, at, monkeypatch)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / file).exists()
    run(tmp_path, ROWS)
    assert (tmp_path / file).read_bytes() == undisturbed[name]


# ---- what changes between two runs


def test_a_clock_that_goes_backwards_changes_nothing(runs, undisturbed, tmp_path, monkeypatch):
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    run, file = runs["resonance"]
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", backwards)
        interrupted(lambda: run(tmp_path, ROWS), 20, monkeypatch)
    for number, path in enumerate(sorted((tmp_path / "parts").rglob("*"))):
        os.utime(path, (4e9 - 1000 * number,) * 2)  # in the future, and the other way round
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", backwards)
        run(tmp_path, ROWS)
    assert (tmp_path / file).read_bytes() == undisturbed["resonance"]


@pytest.mark.parametrize("name", names(slow=("resonance",)))
def test_a_dataset_that_changed_is_refused_by_name_and_nothing_is_touched(name, runs, tmp_path, monkeypatch):
    run, file = runs[name]
    changed = [*ROWS[:-1], {**ROWS[-1], "answer": "another"}]
    interrupted(lambda: run(tmp_path, ROWS), 4, monkeypatch)
    for rows, named in ((changed, "dataset ("), (ROWS[:20], "rows (30 / 20)")):
        before = everything(tmp_path)
        text = refusal(lambda rows=rows: run(tmp_path, rows))
        assert named in text
        assert str(tmp_path) in text
        assert "Choose another output, or remove that folder." in text
        assert everything(tmp_path) == before
    run(tmp_path, ROWS)
    before = everything(tmp_path)
    text = refusal(lambda: run(tmp_path, changed))
    assert "dataset (" in text
    assert "Choose another folder, or remove that one." in text
    assert everything(tmp_path) == before
    assert (tmp_path / file).exists()


def test_a_file_in_the_place_of_the_parts_is_not_touched(runs, tmp_path):
    (tmp_path / "parts").write_text("mine")
    assert "is a file, not a folder" in refusal(lambda: runs["loss"][0](tmp_path, ROWS))
    assert (tmp_path / "parts").read_text() == "mine"


def test_a_manifest_cannot_name_a_place_elsewhere(runs, undisturbed, tmp_path, monkeypatch):
    run, file = runs["loss"]
    output = tmp_path / "deep" / "output"
    interrupted(lambda: run(output, ROWS), 3, monkeypatch)
    path = next((output / "parts").rglob("manifest.json"))
    manifest = json.loads(path.read_text())
    for name, value in (("folder", "../.."), ("../../evil", "/etc/passwd"), ("weights", "../../x")):
        path.write_text(json.dumps({**manifest, "made_of": {**manifest["made_of"], name: value}}))
        assert name in refusal(lambda: run(output, ROWS))
    path.write_text(json.dumps({**manifest, "folder": "/elsewhere", "parts": ["../../x"]}))
    run(output, ROWS)
    assert (output / file).read_bytes() == undisturbed["loss"]
    assert [each.name for each in tmp_path.iterdir()] == ["deep"]

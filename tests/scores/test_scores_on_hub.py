"""Scores, token scores and selections come back from the hub as they went, and no folder of this machine goes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from helpers.commands import QUESTIONS, refused, write
from helpers.hub import WRITES, serving, set_offline
from helpers.shards import scores_of as shard_of
from helpers.tables import make_provenance, make_scores, make_token_scores
from huggingface_hub import DatasetCard, snapshot_download

from resofilter_trainer import DataSelector, InputError, ScoreTable, Selection, SoftPruning, TokenScores
from resofilter_trainer.cli.entry import main

SOURCE = {"dataset": "meta-math/MetaMathQA", "split": "train"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def scores_of(**changes):
    values = [3.0, None, 0.1 + 0.2, np.nextafter(2.0, 3.0)]
    return make_scores(values, provenance=make_provenance(rows=4, **{"source": SOURCE, **changes}))


RECORDS = {
    "scores": (scores_of, lambda record, **options: record.push_to_hub("me/x", **options)),
    "token scores": (
        lambda: make_token_scores([[(1.0, 0.5)], [(0.1, 0.3), (2.0, 1.0)]], provenance=make_provenance(source=SOURCE)),
        lambda record, **options: record.push_to_hub("me/x", **options),
    ),
    "selection": (
        lambda: SoftPruning(by="loss").select(scores_of()),
        lambda record, **options: record.push_to_hub(None, "me/x", **options),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_as_it_went(name, hub, tmp_path):
    make, push = RECORDS[name]
    record = make()
    kind, file = type(record), record.save(tmp_path / "here").name
    push(record, private=True)
    repository = hub.repositories["me/x"]

    assert kind.from_hub("me/x", token=WRITES) == record == kind.load("hf://datasets/me/x")
    assert kind.load(f"hf://datasets/me/x@main/{file}") == record
    assert repository.private
    assert repository.files()[file] == (tmp_path / "here" / file).read_bytes()
    assert next(iter(repository.commits.values())) == {}
    assert [{*files} for files in repository.commits.values()][1:] == [{file, "README.md"}]  # one commit


def test_branches_and_pull_requests_leave_the_main_one_alone(hub):
    scores = scores_of()
    scores.push_to_hub("me/x", revision="trial/1")
    commit = scores.push_to_hub("me/x", create_pr=True, commit_message="Scores")

    assert hub.repositories["me/x"].files() == {}
    assert commit.commit_message == "Scores"
    assert ScoreTable.from_hub("me/x", revision="trial/1") == scores
    assert ScoreTable.from_hub("me/x", revision=commit.pr_revision) == scores
    with pytest.raises(InputError, match=r"has no file 'scores\.parquet'"):
        ScoreTable.from_hub("me/x")


@pytest.mark.parametrize("broken", ["/preupload/", "/lfs/", "/commit/"])
def test_an_interrupted_push_leaves_nothing(broken, hub):
    scores = scores_of()
    hub.broken = broken
    with pytest.raises(InputError, match="me/x"):
        scores.push_to_hub("me/x")
    assert hub.repositories["me/x"].files() == {}
    hub.broken = None
    scores.push_to_hub("me/x")
    assert ScoreTable.from_hub("me/x") == scores


SOMEWHERE = {  # bytes of a value in each file
    "scores": np.nextafter(2.0, 3.0).tobytes(),
    "token scores": np.float32(2.0).tobytes(),
    "selection": b"kept",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_download_is_refused(name, hub):
    make, push = RECORDS[name]
    record = make()
    push(record)
    hub.damage = (SOMEWHERE[name], b"\x07" + SOMEWHERE[name][1:])
    assert any(hub.damage[0] in data for data in hub.repositories["me/x"].files().values())
    again = r"cannot be read[^\n]* Download it again: huggingface_hub\.snapshot_download\('me/x', .*force_download=True"
    with pytest.raises(InputError, match=again):
        type(record).from_hub("me/x")
    hub.damage = None
    snapshot_download("me/x", repo_type="dataset", force_download=True)  # as the message says
    assert type(record).from_hub("me/x") == record


def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch):
    scores = scores_of()
    scores.push_to_hub("me/x")
    ScoreTable.from_hub("me/x")
    set_offline(monkeypatch, True)
    assert ScoreTable.from_hub("me/x") == scores


def test_names_of_folders_stay_here(hub, tmp_path):
    """And all else comes back: what is compared when scores are joined, and what the user says of the source."""
    (tmp_path / "checkpoint").mkdir()
    source = {"dataset": str(tmp_path / "data.jsonl"), "reference": "~/ref", "mine": f"{tmp_path}/x/", "split": "train"}
    scores = scores_of(model=str(tmp_path / "checkpoint"), source=source)
    selection, dataset = DataSelector().select(scores), Dataset.from_dict({"text": list("abcd")})
    scores.push_to_hub("me/scores")
    selection.push_to_hub(dataset, "me/kept", scores, check_rows=False)

    assert str(tmp_path).encode() not in hub.everything()
    back = ScoreTable.from_hub("me/scores")
    assert back.table.equals(scores.table)
    assert back.provenance.differences(scores.provenance) == []
    assert back.provenance.model == "./checkpoint"
    assert back.provenance.source == {"dataset": "./data.jsonl", "reference": "./ref", "mine": "./x", "split": "train"}
    assert str(tmp_path) not in selection.card().text
    assert str(tmp_path) in selection.card(folders=True).text
    assert Selection.from_hub("me/kept")["reason"] == selection["reason"]


def test_names_of_shards_stay_here_too(hub, tmp_path):
    parts = [shard_of(0, 5, {"dataset": f"{tmp_path}/a.jsonl"}), shard_of(5, 11, {"dataset": f"{tmp_path}/b.jsonl"})]
    joined = ScoreTable.concatenate(parts)
    joined.push_to_hub("me/joined")
    DataSelector().select(joined).push_to_hub(None, "me/selected")
    assert str(tmp_path).encode() not in hub.everything()
    text = hub.repositories["me/joined"].files()["README.md"].decode()
    assert "score --model=tiny --dataset=./b.jsonl" in text
    assert "    resofilter join scores-0 scores-1 --output=scores" in text
    assert [each.dataset for each in ScoreTable.from_hub("me/joined").shards] == ["./a.jsonl", "./b.jsonl"]
    unnamed = ScoreTable.concatenate([shard_of(0, 5, {"dataset": None}), shard_of(5, 11)])
    unnamed.push_to_hub("me/joined")
    assert "resofilter score" not in hub.repositories["me/joined"].files()["README.md"].decode()


def test_kept_rows_go_with_their_selection_and_card(hub):
    scores = scores_of()
    selection, dataset = DataSelector().select(scores), Dataset.from_dict({"text": list("abcd")})
    selection.push_to_hub(dataset, "me/kept", scores, "mit", private=True)
    hub.repositories["me/kept"].private = False  # `load_dataset` has no token in its cache's name
    rows = load_dataset("me/kept", split="train")
    card = DatasetCard(hub.repositories["me/kept"].files()["README.md"].decode())

    assert rows["text"][:] == ["c", "d"]
    assert rows["resofilter_score"][:] == [0.1 + 0.2, np.nextafter(2.0, 3.0)]
    assert Selection.from_hub("me/kept") == selection
    assert card.data.to_dict()["license"] == "mit"
    assert [each["config_name"] for each in card.data.to_dict()["configs"]] == ["default", "selection"]
    assert "How to reproduce it" in card.text
    assert load_dataset("me/kept", "selection", split="train")["keep"][:] == selection.keep.tolist()


@pytest.mark.slow
def test_rows_are_never_beside_another_selection(hub):
    scores, dataset = scores_of(), Dataset.from_dict({"text": list("abcd")})
    first, second = (DataSelector(drop=end).select(scores) for end in ("largest", "smallest"))
    first.push_to_hub(dataset, "me/kept")
    hub.broken = "/validate-yaml"
    with pytest.raises(InputError, match="me/kept"):
        second.push_to_hub(dataset, "me/kept")
    assert "selection.parquet" not in hub.repositories["me/kept"].files()
    hub.broken = None
    second.push_to_hub(dataset, "me/kept", scores)
    assert Selection.from_hub("me/kept") == second
    assert "resofilter_loss" in load_dataset("me/kept", split="train").column_names  # which the first had not
    second.push_to_hub(dataset, "me/kept", create_pr=True)
    pull = [name for name in hub.repositories["me/kept"].branches if name.startswith("refs/pr/")]
    assert {*hub.repositories["me/kept"].files(pull[-1])} >= {"selection.parquet", "README.md"}


def test_a_card_of_somebody_elses_keeps_its_text(hub):
    scores = scores_of()
    scores.push_to_hub("me/x")
    files = hub.repositories["me/x"].files()
    files["README.md"] = b"---\nlicense: mit\nconfigs:\n- config_name: mine\n  data_files: a.csv\n---\n\n# My rows\n"
    scores.push_to_hub("me/x", licence="apache-2.0")
    card = DatasetCard(hub.repositories["me/x"].files()["README.md"].decode())

    assert card.text.strip() == "# My rows"
    assert card.data.to_dict()["license"] == "mit"
    assert [each["config_name"] for each in card.data.to_dict()["configs"]] == ["mine", "scores"]


def test_a_card_of_ones_own_is_written_anew(hub):
    scores_of().push_to_hub("me/x", licence="mit")
    scores_of(model="other").push_to_hub("me/x")
    text = hub.repositories["me/x"].files()["README.md"].decode()
    assert "| model | `other` |" in text
    assert text.count("# Scores of") == 1


def test_the_card_has_the_command_that_makes_the_scores_again(hub):
    scores_of().push_to_hub("me/x")
    text = hub.repositories["me/x"].files()["README.md"].decode()
    assert "    resofilter score --model=tiny --dataset=meta-math/MetaMathQA --n_layers=2" in text
    assert "4 rows, 3 scored" in text
    assert "source_datasets:\n- meta-math/MetaMathQA" in text
    scores_of(preparation={"run": {"when": "after"}}).push_to_hub("me/x")
    text = hub.repositories["me/x"].files()["README.md"].decode()
    assert "resofilter score" not in text
    assert "`ResonanceCallback` measured them" in text


def test_the_commands_push_and_load(hub, tmp_path, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    columns = ["--prompt_column", "question", "--completion_column", "answer"]
    scoring = ["score", "--model", str(tiny_model_dir), "--dataset", str(rows), "--output", str(tmp_path / "scores")]
    main([*scoring, *columns, "--push_to_hub", "--hub-model-id", "me/scores", "--hub_private_repo"])
    assert f"Pushed: {hub.url}/datasets/me/scores\n" in capsys.readouterr().out
    selecting = ["select", "hf://datasets/me/scores", "--output", str(tmp_path / "kept")]
    main([*selecting, "--group_column", "kind", "--push_to_hub", "--hub_dataset_id", "me/kept"])
    assert f"Pushed: {hub.url}/datasets/me/kept\n" in capsys.readouterr().out
    main(
        [
            "report",
            "hf://datasets/me/scores",
            "--selection",
            "hf://datasets/me/kept",
            "--output",
            str(tmp_path / "page"),
        ]
    )

    assert hub.repositories["me/scores"].private
    assert ScoreTable.from_hub("me/scores")["score"].tolist() == ScoreTable.load("scores")["score"].tolist()
    assert Selection.from_hub("me/kept") == Selection.load("kept")
    assert "--group_column=kind" in hub.repositories["me/kept"].files()["README.md"].decode()
    assert "what is 0 + 2 ?" in (tmp_path / "page" / "report.html").read_text()
    for secret in (tmp_path, tiny_model_dir):
        assert str(secret).encode() not in hub.everything()


PUSHES = {
    "to no repository": (["--push_to_hub"], "pass --hub_dataset_id owner/name"),
    "without saying so": (["--hub_dataset_id", "me/x"], "--hub_dataset_id goes with --push_to_hub."),
    "to a wrong name": (["--push_to_hub", "--hub_dataset_id", "a/b/c"], "'a/b/c' is no name of a repository"),
}


@pytest.mark.parametrize("name", PUSHES)
def test_wrong_arguments_are_refused_before_the_work(name, hub, tmp_path, capsys):
    words, said = PUSHES[name]
    assert said in refused(capsys, "score", "--model", "none", "--dataset", "none", "--output", tmp_path / "s", *words)
    assert said in refused(capsys, "select", "nowhere", "--output", tmp_path / "kept", *words)


def test_a_page_is_not_written_to_the_hub(capsys):
    assert "pass --output" in refused(capsys, "report", "hf://datasets/me/scores")


SCRIPT = """
import sys
from resofilter_trainer import DataSelector, ScoreTable
scores = ScoreTable.from_hub("me/x")
DataSelector().select(scores).push_to_hub(None, "me/y")
print(len(scores), "torch" in sys.modules)
"""


def test_a_plain_process_needs_the_environment_only_and_no_torch(hub, tmp_path):
    scores_of().push_to_hub("me/x")
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITES}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **own, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "4 False\n"), done.stderr
    assert json.loads(Selection.from_hub("me/y").provenance)["model"] == "tiny"


def test_token_scores_say_what_goes_out(hub):
    record = RECORDS["token scores"][0]()
    record.push_to_hub("me/x")
    card = DatasetCard(hub.repositories["me/x"].files()["README.md"].decode())
    assert "3 learnt tokens of 2 rows" in card.text
    assert "configs" not in card.data.to_dict()
    assert TokenScores.load("hf://datasets/me/x/token_scores.arrow") == record

"""Paths on the hub, and what an error of the hub says; the records themselves are in the tests of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hub import READS, Hub, serving, set_offline
from helpers.tables import make_scores

from resofilter_trainer import InputError, ScoreTable
from resofilter_trainer.io.hub import HubPath, check_can_push, is_on_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


PATHS = {
    "hf://datasets/me/scores": HubPath("me/scores"),
    "hf://datasets/me/scores/": HubPath("me/scores"),
    "hf://datasets/me/scores@v1": HubPath("me/scores", "v1"),
    "hf://datasets/me/scores@a%2Fb/folder": HubPath("me/scores", "a/b", "folder"),
    "hf://datasets/me/scores@refs/pr/3/run/scores.parquet": HubPath("me/scores", "refs/pr/3", "run/scores.parquet"),
}


@pytest.mark.parametrize("text", PATHS)
def test_a_path_is_read_as_huggingface_hub_reads_it(text):
    place = HubPath.of(text)
    assert place == PATHS[text] == HubPath.of(Path(text)) == HubPath.of(str(place))
    assert is_on_hub(text)
    parse = pytest.importorskip("huggingface_hub.utils._hf_uris").parse_hf_uri
    theirs = parse(text)
    assert (theirs.id, theirs.revision, theirs.path_in_repo) == (place.repo_id, place.revision, place.path)


@pytest.mark.parametrize(
    "text", ["hf://me/scores", "hf://datasets/scores", "hf://datasets/me/a/@x@y@", "hf://spaces/a/b"]
)
def test_other_repositories_are_refused(text):
    if text.startswith("hf://datasets/me"):
        assert HubPath.of(text).path == "@x@y@"  # a strange file, but a file
        return
    with pytest.raises(InputError, match=r"names no repository of datasets.*hf://datasets/owner/name"):
        ScoreTable.load(text)


def test_nothing_is_saved_to_a_path_on_the_hub(tmp_path, monkeypatch):
    """It would be a folder called `hf:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is on the hub: write to a folder here"):
        make_scores([1.0]).save("hf://datasets/me/scores")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("text", ["scores", "/hf:/scores", "hf", "./hf://datasets/me/scores"])
def test_a_path_here_stays_one(text):
    assert not is_on_hub(text)


def push(hub: Hub, **options: object) -> None:
    make_scores([1.0, 2.0]).push_to_hub("me/scores", **options)


def load(hub: Hub, **options: object) -> None:
    ScoreTable.from_hub("me/scores", **options)


def without_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    set_offline(patch, True)


def unreachable(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def private(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    push(hub, private=True)
    without_token(hub, patch)


def gated(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    push(hub)
    hub.repositories["me/scores"].gated = True


def pushed(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    push(hub)


def something_else(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    push(hub)
    files = hub.repositories["me/scores"].files()
    del files["scores.parquet"]


def nothing(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    pass


REFUSED = {
    "loaded where there is none": (nothing, load, {}, "is not on the hub, or is private and not yours to see"),
    "loaded from a private one": (private, load, {}, "is private and not yours to see.*hf auth login"),
    "loaded from a gated one": (gated, load, {}, "is gated: ask for access.*hf auth login"),
    "loaded at no revision": (pushed, load, {"revision": "v9"}, "hf://datasets/me/scores@v9' has no such revision"),
    "loaded from something else": (something_else, load, {}, "no scores at .*: it has no file 'scores.parquet'"),
    "loaded offline": (offline, load, {}, "is not in the cache, and HF_HUB_OFFLINE=1 keeps from the hub"),
    "loaded without a hub": (unreachable, load, {}, "The hub cannot be reached for"),
    "pushed by nobody": (without_token, push, {}, "needs a token.*hf auth login.*HF_TOKEN"),
    "pushed by a stranger": (nothing, push, {"token": "hf_no"}, "needs a token that the hub knows"),
    "pushed by a reader": (nothing, push, {"token": READS}, "may not write to 'me/scores'"),
    "pushed offline": (offline, push, {}, "HF_HUB_OFFLINE=1 keeps from the hub"),
    "pushed without a hub": (unreachable, push, {}, "The hub cannot be reached for 'me/scores'"),
    "pushed with an unknown argument": (nothing, push, {"privat": True}, "no argument privat=. Did you mean private="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_says_so_in_one_line(name, hub, monkeypatch):
    before, act, options, said = REFUSED[name]
    before(hub, monkeypatch)
    with pytest.raises(InputError, match=said) as error:
        act(hub, **options)
    assert "\n" not in str(error.value)


def test_others_repositories_and_wrong_names_are_refused(hub, monkeypatch):
    with pytest.raises(InputError, match="may not write to 'you/scores'"):
        make_scores([1.0]).push_to_hub("you/scores")
    with pytest.raises(InputError, match="is no name of a repository on the hub"):
        check_can_push("a/b/c")
    check_can_push("me/scores")
    without_token(hub, monkeypatch)
    with pytest.raises(InputError, match="needs a token"):
        check_can_push("me/scores")

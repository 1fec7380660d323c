"""A name that is no folder here: whether the hub can be asked for it is known within seconds, of whatever it is."""

from __future__ import annotations

import time
from collections.abc import Callable

import huggingface_hub
import pytest
from helpers.hub import Hub, serving, set_offline
from helpers.scoring import arguments
from helpers.tables import make_scores
from huggingface_hub import hf_hub_download

from resofilter_trainer import InputError, load_rows
from resofilter_trainer.compare.config import ComparisonConfig, SelectorConfig
from resofilter_trainer.compare.run import run
from resofilter_trainer.data import files
from resofilter_trainer.data.files import load_stream
from resofilter_trainer.data.loading import check_arguments
from resofilter_trainer.data.models import load_model, load_weights
from resofilter_trainer.data.reference_model import Reference
from resofilter_trainer.data.row_texts import decoder
from resofilter_trainer.io.hub import CARD, KIND, REST, check_reachable
from resofilter_trainer.scores.cards import licence_of

NAME = "nobody/nothing"
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """The seconds of each wait, none of which is waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def unreachable(patch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ENDPOINT": CLOSED,
        "HUGGINGFACE_CO_URL_TEMPLATE": CLOSED + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    patch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", CLOSED + "/{repo_id}", raising=False)


@pytest.fixture
def actions(tiny_llama, tmp_path) -> dict[str, Callable[[str], object]]:
    """What loads something by its name."""
    model = tiny_llama()
    args = arguments()

    def tokenizer(name: str) -> None:
        model.config.name_or_path = name
        load_model(model, None, args)

    def template(name: str) -> None:
        args.chat_template_path = name
        check_arguments(args, None)

    def compared(name: str) -> None:
        places = {"output": str(tmp_path / "compared"), "dataset": "rows.jsonl", "test_dataset": "tests.jsonl"}
        run(ComparisonConfig([SelectorConfig("full")], model=name, **places))

    return {
        "model": lambda name: load_weights(name, args),
        "reference model": lambda name: Reference.find(name, args),
        "tokenizer": tokenizer,
        "chat template": template,
        "dataset": load_rows,
        "stream": load_stream,
        "dataset on the hub": lambda name: load_rows(f"hf://datasets/{name}"),
        "compared model": compared,
    }


ACTIONS = (
    "model", "reference model", "tokenizer", "chat template", "dataset", "stream", "dataset on the hub",
    "compared model",
)  # fmt: skip


@pytest.mark.parametrize("what", ACTIONS)
def test_without_a_hub_a_name_is_refused_within_seconds(what, actions, hub, waited, monkeypatch):
    unreachable(monkeypatch)
    with pytest.raises(InputError, match=f"There is no .* '{NAME}' here. The hub cannot be reached") as error:
        actions[what](NAME)
    assert sum(waited) <= REST
    assert "Check the network" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ACTIONS)
def test_a_name_that_the_hub_does_not_have_is_refused_after_one_question(what, actions, hub, waited):
    with pytest.raises(InputError, match=f"There is no .* '{NAME}' here. .* is not on the hub, or is private"):
        actions[what](NAME)
    assert waited == []
    assert len([each for each in hub.requests if NAME in each]) == 1


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_offline_only_what_is_in_the_cache_can_be_had(what, actions, hub, waited, monkeypatch):
    set_offline(monkeypatch, True)
    with pytest.raises(InputError, match="is not in the cache, and HF_HUB_OFFLINE=1 keeps from the hub"):
        actions[what](NAME)
    assert waited == []


def test_what_is_no_name_on_the_hub_says_so(actions, hub):
    with pytest.raises(InputError, match=r"There is no model in a folder 'my model' here\. .* is no name of a"):
        actions["model"]("my model")


def test_what_is_only_an_addition_is_left_out_within_seconds(hub, waited, monkeypatch, capsys):
    unreachable(monkeypatch)
    assert licence_of(NAME) is None
    assert decoder(NAME) is None
    assert "colours no tokens" in capsys.readouterr().out
    assert sum(waited) <= 2 * REST


def test_what_is_in_the_cache_is_left_to_the_loading(hub: Hub, waited, monkeypatch):
    make_scores([1.0]).push_to_hub("me/scores")
    hf_hub_download("me/scores", CARD, repo_type=KIND)
    unreachable(monkeypatch)
    check_reachable("dataset", "me/scores", ["config.json", CARD], KIND)
    assert waited == []


def test_a_dataset_that_was_prepared_before_is_left_to_the_loading(hub, waited, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "me___meta_math_qa").mkdir()  # as datasets names it
    unreachable(monkeypatch)
    files._check_on_hub("me/MetaMathQA")
    assert waited == []


def test_a_connection_that_is_lost_once_is_tried_once_more(actions, hub, waited, monkeypatch):
    real, errors = huggingface_hub.get_hf_file_metadata, [ConnectionError("lost")]

    def lost_once(*args: object, **settings: object) -> object:
        if errors:
            raise errors.pop()
        return real(*args, **settings)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lost_once)
    with pytest.raises(InputError, match="is not on the hub, or is private"):
        actions["dataset"](NAME)
    assert waited == [REST]

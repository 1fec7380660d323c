"""Every public callable answers a keyword that it does not know, and settings of another type, in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import resofilter_trainer
from resofilter_trainer import ColumnMapping, InputError, ResonanceConfig, TokenCleaning
from resofilter_trainer.config import check_kind, with_known_keywords

CALLS: dict[str, tuple[dict[str, Any], str]] = {  # a mistyped keyword of each, and the one that is meant
    "ColumnMapping": ({"promt_column": "a"}, "prompt_column"),
    "ResonanceConfig": ({"n_layer": 2}, "n_layers"),
    "TokenCleaning": ({"keeep": 0.5}, "keep"),
    "ResonanceCallback": ({"selecter": None}, "selector"),
    "DataSelector": ({"treshold": 1.0}, "threshold"),
    "RandomSelector": ({"sed": 1}, "seed"),
    "SoftPruning": ({"dorp": "largest"}, "drop"),
    "DiverseSelector": ({"feature": np.zeros((2, 2))}, "features"),
    "TokenSelector": ({"rankings": "global"}, "ranking"),
    "Criterion": ({"mesure": len}, "measure"),
    "TokenRule": ({"name": "a", "weigh": len, "need": []}, "needs"),
    "TokenWeights": ({"rule": "stm", "keeep": 0.5}, "keep"),
    "SampleWeights": ({"weights": [1.0]}, "weight"),
    "load_rows": ({"source": "x", "splitt": "train"}, "split"),
    "map_columns": ({"dataset": None, "maping": None}, "mapping"),
    "unpack": ({"data_set": None}, "dataset"),
    "literal": ({"model": None, "sampels": []}, "samples"),
    "read_contents": ({"path": "x", "selction": "y"}, "selection"),
    "write_report": ({"scores": None, "titel": "y"}, "title"),
    "score_dataset": ({"model": "m", "dataset": None, "outptu": "x"}, "output"),
    "score_by": ({"criterion": "loss", "model": "m", "dataset": None, "tokens_per_bach": 1}, "tokens_per_batch"),
    "score_layers": ({"model": "m", "dataset": None, "limt": 1}, "limit"),
    "clean_dataset": ({"model": "m", "dataset": None, "cleaning": None, "drop_emty": True}, "drop_empty"),
    "self_evolve": ({"model": "m", "dataset": None, "cleaning": None, "args": None, "peft_confg": 1}, "peft_config"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mistyped_keyword_is_answered_with_the_nearest(name):
    keywords, meant = CALLS[name]
    with pytest.raises(InputError) as refused:
        getattr(resofilter_trainer, name)(**keywords)
    assert str(refused.value) == f"There is no argument {list(keywords)[-1]}=. Did you mean {meant}=?"


def test_methods_and_functions_keep_their_names_and_arguments():
    @with_known_keywords
    def area(width: int, *, height: int = 2) -> int:
        """The area."""
        return width * height

    assert (area(3), area(width=3, height=4), area.__name__, area.__doc__) == (6, 12, "area", "The area.")
    with pytest.raises(InputError, match="There is no argument heigth="):
        area(3, heigth=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: ColumnMapping(prompt_column=3, completion_column="a"),
            "prompt_column must be the name of a column, or",
        ),
        (lambda: ColumnMapping(prompt_column=[], completion_column="a"), "prompt_column must be .* got \\[\\]"),
        (lambda: ColumnMapping(prompt_column=["a", 3], completion_column="b"), "a list of names, got \\['a', 3\\]"),
        (lambda: ColumnMapping(prompt_column="a", completion_column=["b"]), "completion_column must be the name of a"),
        (lambda: ColumnMapping(text_column=""), "text_column must be the name of a column, got ''"),
        (lambda: ColumnMapping(prompt_column="a", completion_column="a"), "Column 'a' is named twice"),
        (lambda: ColumnMapping(prompt_column=["a", "a"], completion_column="b"), "Column 'a' is named twice"),
        (lambda: ColumnMapping(text_column="a", separator=None), "separator must be text, got None"),
        (lambda: ColumnMapping(text_column="a", conversational="yes"), "conversational must be one of True, False"),
        (lambda: ResonanceConfig(up_projection=3), "up_projection must be a regex over module names, got 3"),
        (lambda: TokenCleaning(group_by=3), "group_by must be the name of a column, got 3"),
    ],
)
def test_settings_of_another_type_are_refused(make, expected):
    with pytest.raises(InputError, match=expected):
        make()


def test_a_kind_is_named_with_what_was_given():
    check_kind("source", "x", str, "text")
    with pytest.raises(InputError, match=r"^source must be text, got None\.$"):
        check_kind("source", None, str, "text")
    with pytest.raises(InputError, match=r"^source must be text, got a list\.$"):
        check_kind("source", ["x"], str, "text")

"""The loss on held-out rows after every training: its value, in which mode and precision, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from resofilter_trainer import InputError
from resofilter_trainer.compare.cells import Cell, summarise
from resofilter_trainer.compare.config import ComparisonConfig
from resofilter_trainer.compare.held_out_loss import held_out_loss, held_out_tokens
from resofilter_trainer.compare.published import Needs
from resofilter_trainer.compare.report import judged, table
from resofilter_trainer.compare.round import Round
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.training import sft_config, train

HELD_OUT = [{"q": f"what is {i} + 3 ?\n", "a": f"{i}+3={i + 3}." + " so it is" * (i % 3)} for i in range(5)]


@pytest.fixture
def compare(tiny_settings, tmp_path):
    """A function from changes of the settings to the comparison; `held_out.jsonl` has the rows for the loss."""
    Dataset.from_list(HELD_OUT).to_json(tmp_path / "held_out.jsonl")

    def config(**changes):
        settings = {**tiny_settings, "selectors": ["random"], "loss_dataset": "held_out.jsonl", **changes}
        return ComparisonConfig.of(settings)

    return config


def by_hand(model, rows) -> float:
    """The mean loss of the learnt tokens of all rows, one row at a time."""
    losses = []
    for row in rows.dataset:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none", ignore_index=-100)
        losses += each[torch.tensor(row["labels"][1:]) != -100].tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_it_is_the_mean_over_tokens_without_dropout_in_the_precision_of_the_weights(bf16, compare, tmp_path):
    name = str(shutil.copytree(compare().model[0], tmp_path / "model"))
    settings = AutoModelForCausalLM.from_pretrained(name).config
    settings.attention_dropout = 0.5
    settings.save_pretrained(name)
    args = sft_config(compare(training={**compare().training, "bf16": bf16}), name, 0)
    texts = Dataset.from_list([{"prompt": each["q"], "completion": each["a"]} for each in HELD_OUT])
    rows = held_out_tokens(texts, name, args)
    assert len({*rows.num_tokens.tolist()}) > 1
    with torch.enable_grad():
        trained = train(name, Dataset.from_list([{"prompt": "1 + 1", "completion": "2"}] * 4), None, args).model
    found = held_out_loss(trained, rows, args)
    plain = AutoModelForCausalLM.from_pretrained(name).eval()
    assert plain.config.attention_dropout == 0.5
    before = by_hand(plain, rows)
    plain.load_state_dict(trained.state_dict())
    assert next(plain.parameters()).dtype == torch.float32
    assert found == pytest.approx(by_hand(plain, rows), rel=1e-6)
    assert found != pytest.approx(before, rel=1e-4)


def test_every_cell_has_it_and_the_table_shows_its_interval(compare, tmp_path):
    config = compare(selectors=["full", "random"], seeds=[0, 1])
    cells = run(config)
    assert all(0 < cell.held_out_loss < math.log(1000) for cell in cells)
    assert len({cell.held_out_loss for cell in cells}) == 4
    assert run(config) == cells


def test_a_comparison_without_it_can_go_on_and_one_with_it_is_another(compare):
    (cell,) = run(compare(loss_dataset=None))
    assert cell.held_out_loss is None
    with pytest.raises(InputError, match=r"they differ in loss_dataset \(None / held_out.jsonl\); loss_split"):
        run(compare())


def test_other_rows_make_another_cell(compare, tmp_path):
    run(compare())
    Dataset.from_list(HELD_OUT[:4]).to_json(tmp_path / "held_out.jsonl")
    with pytest.raises(InputError, match="has a cell that was made from something else: they differ in data "):
        run(compare())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_dataset": "rows.jsonl"}, "12 of the 12 rows of loss_dataset are also in the dataset. "),
        ({"loss_dataset": None, "loss_split": "other"}, "loss_split goes with loss_dataset: name one"),
        ({"loss_dataset": "nothing.jsonl"}, "There is no dataset"),
        ({"loss_split": "validation[:5]x"}, "split"),
        ({"loss_dataset": "other_columns.jsonl"}, "other_columns|column"),
        ({"loss_dataset": "empty.jsonl"}, "In loss_dataset: "),
        ({"dataset": "demo", "model": "demo", "prompt_column": "prompt", "completion_column": "completion",
          "test_dataset": None, "wrong_column": None}, "loss_dataset is for a dataset of your own"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_a_training(changes, message, compare, tmp_path, monkeypatch):
    Dataset.from_list([{"x": "1", "y": "2"}]).to_json(tmp_path / "other_columns.jsonl")
    Dataset.from_list([{"q": "why ?", "a": ""}]).to_json(tmp_path / "empty.jsonl")
    monkeypatch.setattr("resofilter_trainer.compare.round.train", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(InputError, match=message):
        run(compare(**changes))


def test_rows_that_are_also_in_the_dataset_are_counted(compare, tmp_path, own_rows):
    rows = Dataset.from_json(own_rows).select_columns(["q", "a"]).to_list()
    Dataset.from_list([*HELD_OUT, rows[3]]).to_json(tmp_path / "held_out.jsonl")
    with pytest.warns(UserWarning, match="1 of the 6 rows of loss_dataset are also in the dataset, so that"):
        run(compare())


def test_a_training_that_failed_has_none(compare, monkeypatch):
    monkeypatch.setattr(Round, "_failure", lambda self, trained: "diverged: far away")
    (cell,) = run(compare())
    assert (cell.metric, cell.held_out_loss) == (None, None)


# ---- the table


def cell(seed: int, loss: float | None, metric: float | None = 0.5) -> Cell:
    return Cell("full", 1.0, seed, 10, 10, metric, 0.0, 0.0, 1.0, 1.0, held_out_loss=loss)


def test_its_mean_and_interval_are_over_the_seeds_that_have_it():
    (line,) = summarise([cell(0, 1.0), cell(1, 2.0), cell(2, 3.0), cell(3, None, None)])
    mean, low, high = line["held_out_loss"]
    assert (mean, high - mean) == (pytest.approx(2.0), pytest.approx(4.303 / math.sqrt(3)))
    assert low == pytest.approx(4 - high)
    text = table(judged([line], {"full": Needs(0, 1)}))
    assert "held-out loss" in text.splitlines()[0]
    assert "2.000 [-0.484, 4.484]" in text.splitlines()[1]
    assert "nats per learnt token of loss_dataset" in text


def test_without_it_nothing_says_so():
    (line,) = summarise([cell(0, None)])
    assert "held_out_loss" not in json.dumps([line, cell(0, None).to_json()])
    assert "held-out loss" not in table(judged([line], {"full": Needs(0, 1)}))


# ---- mixed precision on a CPU


@pytest.mark.slow
def test_a_comparison_in_mixed_precision_runs_on_a_cpu(compare):
    selectors = ["low_loss", {"method": "signal", "settings": {"by": "loss_sum"}}]
    cells = run(compare(selectors=selectors, training={**compare().training, "bf16": True}))
    assert [cell.failure for cell in cells] == ["", ""]
    assert all(cell.held_out_loss > 0 for cell in cells)

"""Every layer's change against the literal procedure, entry by entry."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.commands import QUESTIONS, refused, write
from helpers.experts import Separate, Stacked
from helpers.samples import CLOSED_FORMS
from helpers.training import llama, rows

from resofilter_trainer import InputError, ResonanceConfig, ScoreTable, score_dataset, score_layers
from resofilter_trainer.cli.entry import main
from resofilter_trainer.data.loading import default_arguments
from resofilter_trainer.model.modes import requiring_grad

ROWS = 8


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer)).double()


def changes_by_the_book(model, tokenizer, example, config):
    """The size of every W_up entry's change by one step of torch's own AdamW, layer by layer."""
    model = copy.deepcopy(model).eval()
    ids = tokenizer(example["prompt"])["input_ids"]
    full = tokenizer(example["prompt"] + example["completion"])["input_ids"] + [tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(ids) + full[len(ids) :]])
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    with requiring_grad(model.parameters(), True):
        model(input_ids=torch.tensor([full]), labels=labels).loss.backward()
    optimizer.step()
    return [(old - new.detach()).abs().numpy() for old, new in zip(before, weights, strict=True)]


def test_changes_and_their_quantiles_are_those_of_torchs_adamw(model, tokenizer, tmp_path):
    config, dataset = ResonanceConfig(eps=1e-6), rows(ROWS)
    scores = score_layers(model, dataset, tokenizer, config=config, limit=ROWS)

    for row in range(ROWS):
        for layer, change in enumerate(changes_by_the_book(model, tokenizer, dataset[row], config)):
            assert scores.column(f"layer_{layer}")[row] == pytest.approx(change.mean(), rel=1e-9)
            quartiles = [scores.column(f"layer_{layer}_{part}")[row] for part in ("q25", "q75")]
            assert quartiles == pytest.approx(np.quantile(change, [0.25, 0.75]), rel=1e-9)


@pytest.mark.parametrize("norm", ["mean_abs", "l2"])
@pytest.mark.parametrize("update", CLOSED_FORMS)
def test_the_last_layers_are_those_of_the_scoring_pass(model, tokenizer, update, norm):
    config, dataset = ResonanceConfig(update=update, norm=norm), rows(ROWS)
    every = score_layers(model, dataset, tokenizer, config=config, limit=ROWS)
    last = score_dataset(model, dataset, tokenizer, config=config, precision="float32")

    for name in ("layer_1", "layer_2", "layer_3", "loss"):
        np.testing.assert_allclose(every.column(name), last.column(name), rtol=1e-5)  # Llama's norms are float32
    np.testing.assert_allclose(every.column("score"), np.mean([every.column(f"layer_{i}") for i in range(4)], axis=0))


@pytest.mark.parametrize("kind", [Separate, Stacked])
def test_experts_that_no_token_reaches_change_as_in_the_scoring_pass(tokenizer, kind):
    model = llama(len(tokenizer))
    for layer in model.model.layers:
        layer.mlp = kind(model.config.hidden_size)
    config, dataset = ResonanceConfig(weight_decay=0.1), rows(ROWS)
    every = score_layers(model.double(), dataset, tokenizer, config=config, limit=ROWS)
    last = score_dataset(model, dataset, tokenizer, config=config, precision="float32")
    for name in ("layer_1", "layer_2", "layer_3"):
        np.testing.assert_allclose(every.column(name), last.column(name), rtol=1e-5)


def test_some_rows_are_measured_and_the_others_say_why_not(model, tokenizer, tmp_path):
    scores = score_layers(model, rows(20), tokenizer, output=tmp_path, limit=5)
    again = score_layers(model, rows(20), tokenizer, output=tmp_path, limit=5)

    assert len(scores) == 20
    assert scores.scored.sum() == 5
    assert set(scores.reasons) == {None, "not among the 5 random rows that were measured"}
    assert scores.table.equals(ScoreTable.load(tmp_path / "layers").table)
    assert again.table.equals(scores.table)


def test_another_limit_is_refused(model, tokenizer, tmp_path):
    score_layers(model, rows(8), tokenizer, output=tmp_path, limit=3)
    with pytest.raises(InputError, match="limit"):
        score_layers(model, rows(8), tokenizer, output=tmp_path, limit=4)


def test_weights_do_not_change(model, tokenizer):
    before = copy.deepcopy(model.state_dict())
    needs = [each.requires_grad for each in model.parameters()]
    score_layers(model, rows(3), tokenizer)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert needs == [each.requires_grad for each in model.parameters()]


def test_a_limit_below_one_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="limit must be a whole number of at least 1, got 0"):
        score_layers(model, rows(3), tokenizer, args=default_arguments(), limit=0)


def test_the_command_writes_them_beside_the_scores(tmp_path, tiny_model_dir, capsys):
    write(tmp_path / "rows.jsonl", QUESTIONS)
    common = [
        "--model",
        str(tiny_model_dir),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "s"),
    ]
    common += ["--prompt_column", "question", "--completion_column", "answer"]
    main(["score", *common, "--layers", "all", "--limit", "4"])

    assert ScoreTable.load(tmp_path / "s" / "layers").scored.sum() == 4
    assert "4 of 12 rows, every layer" in capsys.readouterr().out
    assert "--limit goes with --layers" in refused(capsys, "score", *common, "--limit", "4")
    assert "leave --criterion" in refused(capsys, "score", *common, "--layers", "all", "--criterion", "loss")

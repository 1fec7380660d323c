"""axolotl's plugin, in a stand-in for axolotl: its settings, what it changes and what it refuses."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.training import llama, rows

from resofilter_trainer import InputError

pytest.importorskip("pydantic", reason="axolotl's settings are pydantic's models, and it is not installed")
from helpers import axolotl

ROWS = 21
FULL, HALF = [4, 4, 4], [4, 2, 2]  # steps of 6 rows in each epoch: 21 rows, and 10 or 11


@pytest.fixture
def plugin(monkeypatch):
    return axolotl.plugin(monkeypatch)


def tokens(tokenizer) -> Dataset:
    """The rows as axolotl prepares them."""
    made = []
    for row in rows(ROWS):
        prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        made.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "length": len(ids)})
    return Dataset.from_list(made)


def train(text, plugin, tokenizer, output):
    """The trainer and the rows of every step of a training with these settings."""
    dataset, model, seen = tokens(tokenizer), llama(len(tokenizer)), []
    known = {tuple(ids): row for row, ids in enumerate(dataset["input_ids"])}

    def see(module, args, kwargs):
        if not module.training:  # the pass of when="before"
            return
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(known[tuple(ids[mask.bool()].tolist())])

    model.register_forward_pre_hook(see, with_kwargs=True)
    return axolotl.train(axolotl.load(text, plugin), plugin, model, dataset, output), seen


def test_where_everything_is_kept_nothing_changes(plugin, tokenizer, tmp_path):
    mine, seen = train("resofilter:\n  keep: 1.0\n  eps: 1e-4\n", plugin, tokenizer, tmp_path / "mine")
    other, order = train("plugins: []\n", plugin, tokenizer, tmp_path / "other")
    assert seen == order
    assert mine.state.max_steps == other.state.max_steps == 11  # axolotl rounds the steps of all epochs together
    for name, value in mine.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])


def test_half_of_the_rows_are_trained_on(plugin, tokenizer, tmp_path):
    trainer, seen = train("resofilter:\n  keep: 0.5\n  eps: 1e-4\n", plugin, tokenizer, tmp_path)
    folder = tmp_path / "resofilter"
    plan = json.loads((folder / "plan.json").read_text())
    assert trainer.state.global_step == sum(HALF), plan
    start = ROWS
    for epoch in (2, 3):
        selection = pd.read_parquet(folder / f"selection-epoch-{epoch}.parquet")
        kept = selection["sample_id"][selection["keep"]].tolist()
        assert sorted(seen[start : start + len(kept)]) == kept
        start += len(kept)
    assert start == len(seen)
    scores = pd.read_parquet(folder / "scores-epoch-1.parquet")["score"].to_numpy()
    first = pd.read_parquet(folder / "selection-epoch-2.parquet")["keep"].to_numpy()
    assert scores[first].max() <= scores[~first].min()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all()


def test_rows_are_dropped_before_the_first_epoch(plugin, tokenizer, tmp_path):
    trainer, seen = train("resofilter:\n  keep: 0.5\n  when: before\n", plugin, tokenizer, tmp_path)
    assert trainer.state.global_step == 3 * HALF[-1]
    selection = pd.read_parquet(tmp_path / "resofilter/selection-epoch-1.parquet")
    kept = selection["sample_id"][selection["keep"]].tolist()
    assert sorted(seen) == sorted(kept * 3)


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (2, 4)), 5])
def test_it_resumes(step, plugin, tokenizer, tmp_path):
    text = "resofilter:\n  keep: 0.5\n  eps: 1e-4\n"
    whole, _ = train(text, plugin, tokenizer, tmp_path)
    scores = (tmp_path / "resofilter/scores.parquet").read_bytes()
    text = f"{text}resume_from_checkpoint: {tmp_path}/checkpoint-{step}\n"
    resumed, _ = train(text, plugin, tokenizer, tmp_path)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert (tmp_path / "resofilter/scores.parquet").read_bytes() == scores


def test_max_steps_in_the_yaml_fixes_the_length(plugin, tokenizer, tmp_path):
    trainer, _ = train("max_steps: 10\nresofilter:\n  keep: 0.5\n", plugin, tokenizer, tmp_path)
    assert trainer.state.global_step == 10


def test_every_kind_of_setting_is_read(plugin, monkeypatch):
    text = """\
resofilter:
  keep: [1, 5e-1]
  when: before
  eps: 1e-4
  lr: 1.5E-05
  n_layers: 2
  norm: l2
  update: sgd
  up_projection: layers.1e5.up
"""
    cfg = axolotl.load(text, plugin)
    trainer = type("Trainer", (), {"args": type("Arguments", (), {"max_steps": 7})()})()
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    assert callback.filter.keep == [1, 0.5]
    assert callback.filter.when == "before"
    assert (callback.config.eps, callback.config.lr, callback.config.n_layers) == (1e-4, 1.5e-5, 2)
    assert (callback.config.norm, callback.config.update) == ("l2", "sgd")
    assert callback.config.up_projection == "layers.1e5.up"
    assert trainer.args.max_steps == -1


def test_without_settings_the_defaults_hold(plugin):
    (callback,) = plugin.add_callbacks_post_trainer(
        axolotl.load("", plugin), type("T", (), {"args": axolotl.Settings()})
    )
    assert callback.filter.shares(3) == [1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resofilter:\n  kep: 0.5\n", r"`resofilter:` in the YAML: There is no argument kep=\. Did you mean keep=\?"),
        ("resofilter:\n  keep: 2\n", r"keep is the share of the rows to keep, above 0 and at most 1, got 2"),
        ("resofilter:\n  keep: half\n", r"got 'half'"),
        ("resofilter:\n  keep: true\n", r"got True"),
        ("resofilter:\n  when: bfore\n", r"Did you mean 'before'\?"),
        ("resofilter:\n  eps: -1e-4\n", r"eps must be a finite number above 0, got -0\.0001"),
        ("resofilter:\n  1: 2\n", r"There is no argument 1="),
        ("resofilter: 0.5\n", r"such as `  keep: 0\.5`, got 0\.5"),
        ("resofilter:\n  - keep\n", r"such as `  keep: 0\.5`, got \['keep'\]"),
        ("resofilter:\n  selector: SoftPruning\n", r"selector= is an object of Python, .* Use keep= or threshold="),
        ("resofilter:\n  token_cleaning: {keep: 0.6}\n", r"token_cleaning= needs .* \(`resofilter clean`\)"),
        ("resofilter:\n  token_rule: profit\n", r"token_rule= weighs .* \(`resofilter clean`\)"),
        ("resofilter:\n  keep_tokens: 0.5\n", r"keep_tokens= goes with token_rule=. Leave it out"),
        ("resofilter:\n  dataset: rows\n", r"dataset= is for packed rows, which the plugin refuses. Leave it out"),
        ("resofilter:\n  id_column: name\n", r"id_column= is for a stream, which the plugin refuses. Leave it out"),
        ("sample_packing: true\n", r"sample_packing, which packs .* Set `sample_packing: false`"),
        ("streaming: true\n", r"Set `streaming: false`"),
        ("pretraining_dataset: wiki\n", r"Use `datasets:` instead"),
        ("rl: dpo\n", r"rl, which .* Leave the plugin out"),
        ("lora_mlp_kernel: true\n", r"Set `lora_mlp_kernel: false`"),
        ("torch_compile: true\n", r"Set `torch_compile: false`"),
        ("fp16: true\n", r"Set `bf16: true`, or both `bf16: false` and `fp16: false`"),
        ("deepspeed: zero2.json\n", r"deepspeed, which .* train on the selection without the plugin"),
        ("fsdp_config: {fsdp_version: 2}\n", r"fsdp_config, which shards"),
        ("context_parallel_size: 2\n", r"Set `context_parallel_size: 1`"),
        ("cosine_min_lr_ratio: 0.1\n", r"Use `lr_scheduler: cosine_with_min_lr` with .*; or set `max_steps`"),
        ("lr_scheduler: rex\n", r"`lr_scheduler: rex` .* such as `lr_scheduler: cosine`"),
        ("jagged_restart_steps: 5\n", r"`jagged_restart_steps` .* Leave it out"),
    ],
)
def test_what_cannot_work_is_refused_when_the_yaml_is_read(text, message, plugin):
    with pytest.raises(InputError, match=message) as error:
        axolotl.load(text, plugin)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "sample_packing: false\ncontext_parallel_size: 1\n",
        "cosine_min_lr_ratio: 0.1\nmax_steps: 5\n",
        "cosine_min_lr_ratio: 0.1\nresofilter:\n  keep: 1.0\n",
        "lr_scheduler: cosine_with_min_lr\n",
    ],
)
def test_the_remedies_are_accepted(text, plugin):
    plugin.pre_model_load(axolotl.load(text, plugin))


def test_a_kernel_that_axolotl_turns_on_is_turned_off_and_a_setting_that_it_makes_is_refused(plugin):
    cfg = axolotl.load("adapter: lora\n", plugin)
    assert cfg["lora_mlp_kernel"]
    with pytest.warns(UserWarning, match="lora_mlp_kernel, which axolotl turns on by default, is off"):
        plugin.pre_model_load(cfg)
    assert cfg["lora_mlp_kernel"] is False
    plugin.pre_model_load(axolotl.load("adapter: lora\nlora_mlp_kernel: false\n", plugin))
    cfg = axolotl.Settings(axolotl.load("", plugin), fp16=True)  # what `bf16: auto` becomes on an old GPU
    with pytest.raises(InputError, match="fp16"):
        plugin.pre_model_load(cfg)


def test_a_plugin_of_earlier_settings_does_nothing(plugin):
    cfg = axolotl.Settings(
        plugins=["axolotl.integrations.liger.LigerPlugin"], sample_packing=True, lora_mlp_kernel=True
    )
    plugin.pre_model_load(cfg)
    assert cfg["lora_mlp_kernel"]
    assert plugin.add_callbacks_post_trainer(cfg, None) == []
    assert plugin.add_callbacks_post_trainer(axolotl.Settings(), None) == []


def test_a_library_that_is_missing_or_too_old_is_told_when_the_yaml_is_read(monkeypatch):
    """Not when the plugin is imported: axolotl would print that, and train without it."""
    monkeypatch.setitem(sys.modules, "resofilter_trainer.training.callback", None)
    plugin = axolotl.plugin(monkeypatch)
    with pytest.raises(ImportError):
        axolotl.load("", plugin)

"""The plugin in axolotl itself, where it is installed, through its command: each training is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from helpers.training import llama, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed"),
]
PLUGIN = "resofilter_trainer.integrations.axolotl.ResonancePlugin"
YAML = """\
base_model: {base}
datasets:
  - {{path: {base}/rows.jsonl, ds_type: json, type: alpaca}}
dataset_prepared_path: {base}/prepared
shuffle_merged_datasets: false
val_set_size: 0
output_dir: {output}
sequence_len: 256
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 3
optimizer: adamw_torch
learning_rate: 1e-3
bf16: false
fp16: false
attn_implementation: sdpa
save_strategy: steps
save_steps: 1
seed: 3
"""
RESOFILTER = f"plugins: [{PLUGIN}]\nresofilter: {{{{keep: KEEP, eps: 1e-4}}}}\n"


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a model, its tokenizer and 24 rows."""
    folder = tmp_path / "base"
    tokenizer.save_pretrained(folder)
    llama(len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    made = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in rows(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def train(base, name, text=""):
    """Train by axolotl's command; the folder of the results."""
    output, settings = base.parent / name, base.parent / f"{name}.yml"
    settings.write_text((YAML + text).format(base=base, output=output))
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "axolotl.cli.train", str(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_callback_in_axolotl(base):
    without, everything = train(base, "without"), train(base, "everything", RESOFILTER.replace("KEEP", "1.0"))
    assert weights(everything) == weights(without)

    text = RESOFILTER.replace("KEEP", "0.5")
    half = train(base, "half", text)
    plan = json.loads((half / "resofilter/plan.json").read_text())
    assert [each["rows"] for each in plan] == [24, 12, 12]
    scores = pd.read_parquet(half / "resofilter/scores-epoch-1.parquet")["score"]
    keep = pd.read_parquet(half / "resofilter/selection-epoch-2.parquet")["keep"]
    assert scores[keep].max() <= scores[~keep].min()
    steps = json.loads((half / "checkpoint-7/trainer_state.json").read_text())["global_step"]
    assert steps == 3 + 2 + 2

    resumed = train(base, "resumed", f"{text}resume_from_checkpoint: {half}/checkpoint-4\n")
    assert weights(resumed) == weights(half)
    name = "resofilter/scores.parquet"
    assert (resumed / name).read_bytes() == (half / name).read_bytes()

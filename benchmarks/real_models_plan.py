"""How long the parts of `real_models.py` take with a model here, from its measured tokens a second."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from real_models_detection import first_questions
from real_models_rows import DATA, Rows, named, training_rows
from real_models_training import ANSWER, DETECTORS, KEEP, RATES, lora_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROWS, NEW_TOKENS, PROMPTS = 8, 16, 32
PLANTED, WRITING = 1.65, 600  # rows with planted ones over drawn ones; seconds of writing in a probe at most
SCORING = 1.5  # forwards and a part of the backward, for all signals of the one pass, and measuring some rows again
EVERY_LAYER = 3.0  # the same for every layer
ARMS = 3  # halves by a score: resonance, loss, the probe's; beside them all rows, a random half, and the right rows


def plan(model: str, data: Path, args: argparse.Namespace) -> list[str]:
    """What each part would take, in hours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    if (lora := lora_of(args.lora_r)) is not None:
        loaded = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", **lora))
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = training_rows(data, args.training_rows, args.test_rows)
    tokens = {name: _tokens(tokenizer, getattr(rows, name)) for name in ("as_is", "noisy")}
    detected = {name: _tokens(tokenizer, first_questions(DATA[name](data), args.rows)) for name in args.data}
    forward, training, writing, plain = _speeds(loaded, tokenizer, rows.as_is[:ROWS], rows.test[:PROMPTS], args.bf16)
    tests = len(rows.test) * ANSWER / writing + _tokens(tokenizer, rows.held_out) / plain
    right = {name: sum(not row["wrong"] for row in getattr(rows, name)) / len(getattr(rows, name)) for name in tokens}
    trained = KEEP + (1 if args.equal_cost else 0)  # epochs of a half
    arms = {name: 1 + (ARMS + 1) * trained + right[name] for name in tokens}
    tested = 2 + (ARMS + 1) * (2 if args.equal_cost else 1)
    row = sum(detected.values()) / args.rows / len(args.data)  # tokens
    probes = args.probe_rows * PLANTED * row * SCORING / forward + (0 if args.no_self_made else WRITING)
    seeds = len(args.seeds)
    rates = 0 if args.learning_rate else len(RATES) * args.epochs * tokens["as_is"] / training
    seconds = {
        "detection": sum(detected.values()) * (SCORING + EVERY_LAYER) * len(args.states) / forward,
        "probe": len(args.data) * probes,
        "training": rates
        + sum(
            seeds * (args.epochs * arms[name] * tokens[name] / training + tested * tests)
            + ARMS * tokens[name] * SCORING / forward
            + probes
            for name in args.sets
        ),
        "detectors": seeds * len(DETECTORS) * (args.epochs * KEEP * tokens["noisy"] / training + tests),
    }
    lines = [
        f"{named(model)} on {device}: {forward:,.0f} tokens a second in a forward, {training:,.0f} in training, "
        f"{writing:,.0f} written"
    ]
    return lines + [f"  {part:10} about {seconds[part] / 3600:.1f} hours" for part in args.parts]


def _speeds(
    model: PreTrainedModel, tokenizer: Any, rows: Rows, prompts: Rows, bf16: bool
) -> tuple[float, float, float, float]:
    """Tokens a second: of a forward, of a step of training, written in a batch of prompts, and of a forward without
    autocast, as it measures a held-out loss.
    """
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [row["prompt"] + row["completion"] for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    batch["labels"] = batch["input_ids"]
    asked = tokenizer([row["prompt"] for row in prompts], return_tensors="pt", padding=True, padding_side="left").to(
        model.device
    )
    count = int(batch["attention_mask"].sum())

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    def train() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def write() -> None:
        with torch.no_grad():
            model.generate(**asked, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        speeds = count / _seconds(forward), count / _seconds(train), len(prompts) * NEW_TOKENS / _seconds(write)
    return *speeds, count / _seconds(forward)


def _seconds(work: Callable[[], None]) -> float:
    """The seconds of a piece of work: the median of three times, after a first one."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _tokens(tokenizer: Any, rows: Rows) -> int:
    texts = [row["prompt"] + row["completion"] for row in rows]
    return sum(len(each) for each in tokenizer(texts)["input_ids"])

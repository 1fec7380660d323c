"""LESS against a second warm-up with plain gradients by autograd; and its functions one by one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from helpers.scoring import arguments
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTTrainer

from resofilter_trainer import InputError
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.config.compatibility import set_warmup
from resofilter_trainer.data.loading import usable_rows
from resofilter_trainer.data.preparation import prepare
from resofilter_trainer.scoring.less import LessConfig, less_scores, preconditioned, project, projection_flops

CONFIG = LessConfig(share=0.5, epochs=2, learning_rate=1e-2, lora_r=2, dimensions=1 << 20)


def rows(count, word="fox"):
    return Dataset.from_list(
        [{"prompt": f"what is {i} ?", "completion": f" {word} " * (1 + i % 3) + str(i * 7 % 10)} for i in range(count)]
    )


def prepared(dataset, tokenizer, args):
    usable, _ = usable_rows(dataset, ColumnMapping(), args, False, False)
    return prepare(usable, tokenizer, args)


def settings(tmp_path, **changes):
    return arguments(
        per_device_train_batch_size=2,
        activation_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        **changes,
    )


class ByTheBook(TrainerCallback):
    """The same at the end of every epoch, by autograd on the model's own loss."""

    def __init__(self, train, validation):
        self.train, self.validation, self.influence, self.rates = train, validation, 0, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_epoch_end(self, args, state, control, **kwargs):
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        weights = [weight for weight in model.parameters() if weight.requires_grad]

        def gradient(example):
            model.eval()
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:])
            found = torch.autograd.grad(loss, weights)
            model.train()
            return found

        def applied(found):
            moved = []
            for g, weight in zip(found, weights, strict=True):
                state = optimizer.state[weight]
                m = 0.9 * state["exp_avg"] + 0.1 * g
                v = 0.999 * state["exp_avg_sq"] + 0.001 * g**2
                moved.append(m / torch.sqrt(v + 1e-8))
            return moved

        def direction(parts):
            flat = torch.cat([part.flatten() for part in parts])
            return flat / flat.norm()

        good = [direction(gradient(example)) for example in self.validation.dataset]
        own = [direction(applied(gradient(example))) for example in self.train.dataset]
        rate, self.rates = np.mean(self.rates), []
        self.influence = self.influence + rate * np.array(
            [np.mean([float(one @ other) for other in good]) for one in own]
        )


def test_the_influence_is_that_of_a_warm_up_by_the_book(tmp_path, tiny_llama, tokenizer):
    args = settings(tmp_path)
    train, validation = prepared(rows(12), tokenizer, args), prepared(rows(3, "dog"), tokenizer, args)
    found = less_scores(tiny_llama(), tokenizer, train, validation, args, CONFIG)

    some = np.sort(np.random.default_rng(0).choice(12, 6, replace=False))
    warm_up = copy.copy(args)
    warm_up.output_dir, warm_up.save_strategy = str(tmp_path), "no"
    warm_up.num_train_epochs, warm_up.learning_rate, warm_up.seed = 2, 1e-2, 0
    set_warmup(warm_up, 0.03)
    watch = ByTheBook(train, validation)
    trainer = SFTTrainer(
        tiny_llama(),
        warm_up,
        train_dataset=train.select(some).dataset.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
        callbacks=[watch],
    )
    trainer.train()
    np.testing.assert_allclose(found, watch.influence, rtol=1e-3, atol=1e-7)
    assert np.ptp(found) > 0


@pytest.mark.slow
def test_rows_like_the_validation_rows_are_found(tmp_path, tiny_llama, tokenizer):
    args = settings(tmp_path)
    mixed = Dataset.from_list([*rows(8, "fox").to_list(), *rows(8, "quick brown").to_list()])
    config = LessConfig(share=1.0, epochs=2, learning_rate=1e-2, lora_r=2, dimensions=512)
    of_fox = less_scores(
        tiny_llama(),
        tokenizer,
        prepared(mixed, tokenizer, args),
        prepared(rows(4, "fox"), tokenizer, args),
        args,
        config,
    )
    assert of_fox[:8].mean() > of_fox[8:].mean()


@pytest.mark.slow
def test_a_projection_keeps_angles():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 20_000, generator=generator)
    features = torch.cat([base, base + 0.5 * torch.randn(1, 20_000, generator=generator), torch.randn(1, 20_000)])
    small = project(features, 4096, seed=0)
    assert small.shape == (3, 4096)

    def cosine(rows, i, j):
        return torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0).item()

    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert cosine(small, i, j) == pytest.approx(cosine(features, i, j), abs=0.06)
    assert torch.equal(small, project(features, 4096, seed=0))
    assert not torch.equal(small, project(features, 4096, seed=1))
    torch.testing.assert_close(project(features[:1], 4096, seed=0), small[:1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cost_of_projecting_is_counted_from_the_adapters(family):
    config, model = LessConfig(epochs=3, lora_r=4, dimensions=100), tiny(family)
    flops = projection_flops(model, 7, config)
    lora = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, lora)
    size = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert flops == 2 * 3 * 7 * size * 100
    assert projection_flops(tiny(family), 7, LessConfig(lora_r=4, dimensions=size)) == 0  # left as they are


def test_few_features_are_left_as_they_are():
    features = torch.randn(3, 10)
    assert torch.equal(project(features, 10, seed=0), features)


def test_preconditioned_is_adams_next_step():
    g, m, v = torch.tensor([1.0, -2]), torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.1])
    found = preconditioned(g, m, v, (0.9, 0.999), 1e-8)
    expected = [(0.45 + 0.1) / (0.24975 + 0.001 + 1e-8) ** 0.5, (0.45 - 0.2) / (0.0999 + 0.004 + 1e-8) ** 0.5]
    assert found.tolist() == pytest.approx(expected)


def test_an_optimizer_without_moments_is_refused(tmp_path, tiny_llama, tokenizer):
    args = settings(tmp_path, optim="sgd")
    train = prepared(rows(4), tokenizer, args)
    with pytest.raises(InputError, match="Adam's own moments"):
        less_scores(tiny_llama(), tokenizer, train, train, args, CONFIG)


@pytest.mark.parametrize("changes", [{"share": 0}, {"share": 1.5}, {"epochs": 0}, {"lora_r": 0}, {"dimensions": 0}])
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        LessConfig(**changes)

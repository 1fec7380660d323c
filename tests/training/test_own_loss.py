"""The loss that a Trainer really backpropagates: the usual ones raise no alarm, others are followed or refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from helpers.samples import record_all
from helpers.training import arguments, llama, rows, train
from peft import LoraConfig
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, ResonanceConfig, TokenCleaning
from resofilter_trainer.selecting.policies import SoftPruning

CONFIG = ResonanceConfig(update="sgd")  # its scores are proportional to a row's weight


def tokens(tokenizer, count: int = 16) -> Dataset:
    """Rows of many lengths, with prompts that are not learnt."""
    made = []
    for row in rows(count):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*prompt, *tokenizer(row["completion"]).input_ids]
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return Dataset.from_list(made)


def pad(examples):
    longest = max(len(example["input_ids"]) for example in examples)

    def filled(name, value):
        return torch.tensor([list(each[name]) + [value] * (longest - len(each[name])) for each in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def certain(tokenizer, **config):
    """A model whose predictions are far from uniform."""
    model = llama(len(tokenizer), **config)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def trained(kind, output, tokenizer, model=None, loss=None, keep=1.0, **changes):
    """One epoch of a plain Trainer or an SFTTrainer at a learning rate of zero; the trainer and the callback."""
    model = certain(tokenizer) if model is None else model
    callback = ResonanceCallback(keep=keep, update="sgd")
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 3, **changes}
    dataset, extra = tokens(tokenizer), {} if loss is None else {"compute_loss_func": loss}
    if issubclass(kind, SFTTrainer):
        trainer = kind(
            model,
            arguments(output, dataset_kwargs={"skip_prepare_dataset": True}, **settings),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[callback],
            **extra,
        )
    else:
        args = TrainingArguments(
            output_dir=str(output), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings
        )
        trainer = kind(model, args, pad, dataset, callbacks=[callback], **extra)
    trainer.train()
    return trainer, callback


def assert_right(trainer, callback, tolerance: float = 1e-4) -> None:
    """The scores are those of each row's own mean token loss, whatever the trainer's loss."""
    samples = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    truth = record_all(trainer.model, samples, CONFIG, size=1)
    np.testing.assert_allclose(callback.scores.column("measured"), truth.score, rtol=tolerance)


# ---- followed: rows that weigh more or less


def batch_mean(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def row_mean(outputs, labels, num_items_in_batch=None):
    each = F.cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return (each.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def row_weights(outputs, labels, num_items_in_batch=None):
    each = F.cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return (each.sum(1) * (1 + labels[:, -1:].remainder(3)[:, 0])).sum() / num_items_in_batch


FOLLOWED = {"batch mean": batch_mean, "row mean": row_mean, "row weights": row_weights}


def of_class(base, loss):
    """A trainer with the loss in its `compute_loss`."""

    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            found = loss(outputs, inputs["labels"], num_items_in_batch)
            return (found, outputs) if return_outputs else found

    return Own


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_rows_are_measured_by_the_weights_that_the_loss_gives_them(base, accumulation, name, tmp_path, tokenizer):
    kind = of_class(base, FOLLOWED[name])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = trained(kind, tmp_path, tokenizer, gradient_accumulation_steps=accumulation)
    assert_right(*found)
    differs = (name, accumulation) != ("batch mean", 1)  # the mean of the step's only batch is the usual loss
    assert len([each for each in said if "in its own way" in str(each.message)]) == differs


def test_a_loss_function_is_followed_too(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="weighs rows in its own way"):
        assert_right(*trained(Trainer, tmp_path, tokenizer, loss=row_mean))


def test_a_loss_that_is_scaled_after_compute_loss(tmp_path, tokenizer):
    class Scaled(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return 0.25 * super().compute_loss(*args, **kwargs)

    with pytest.warns(UserWarning, match=r"0\.25 times"):
        assert_right(*trained(Scaled, tmp_path, tokenizer))


def test_a_training_step_of_ones_own(tmp_path, tokenizer):
    class Halved(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch) / 2
            loss.backward()
            return loss.detach()

    with pytest.warns(UserWarning, match=r"0\.5 times"):
        assert_right(*trained(Halved, tmp_path, tokenizer))


def test_a_model_that_ignores_the_number_of_items(tmp_path, tokenizer):
    class Mean(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    model = certain(tokenizer)
    model.__class__ = Mean
    with pytest.warns(UserWarning, match="weighs rows in its own way"):
        assert_right(*trained(Trainer, tmp_path, tokenizer, model, gradient_accumulation_steps=2))


def test_the_first_batch_agrees_by_chance(tmp_path, tokenizer):
    """Of a single row, the batch's mean is the mean over all tokens: only the last batches weigh more."""

    class Late(Trainer):
        count = 0

        def compute_loss(self, *args, **kwargs):
            self.count += 1
            return super().compute_loss(*args, **kwargs) * (3 if self.count > 4 else 1)

    with pytest.warns(UserWarning, match="3 times"):
        assert_right(*trained(Late, tmp_path, tokenizer))


def test_with_accumulation_rows_cannot_be_dropped(tmp_path, tokenizer):
    """An epoch that is filled up would divide by zero."""
    with pytest.raises(InputError, match=r"Accumulate 1 batch in one process, pass keep=1\.0"):
        trained(Trainer, tmp_path, tokenizer, loss=batch_mean, keep=0.5, gradient_accumulation_steps=2)


# ---- refused: what is no weighted sum of the rows' losses


def focal(outputs, labels, num_items_in_batch=None):
    each = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).sum() / num_items_in_batch


def smoothed(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) / num_items_in_batch


def tempered(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].transpose(1, 2) / 2
    return F.cross_entropy(logits, labels[:, 1:], reduction="sum") / num_items_in_batch


def normalised(outputs, labels, num_items_in_batch=None):
    plain = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return plain / num_items_in_batch + 1e-3 * outputs.logits.logsumexp(-1).square().mean()


def penalised(outputs, labels, num_items_in_batch=None):
    plain = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return plain / num_items_in_batch + 0.1 * outputs.hidden_states[-1].square().mean()


def later_tokens(outputs, labels, num_items_in_batch=None):
    each = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (each * torch.linspace(1, 2, each.shape[1])).sum() / num_items_in_batch


def hardest_rows(outputs, labels, num_items_in_batch=None):
    each = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    return each.topk(2).values.sum() / num_items_in_batch


REFUSED = {
    focal: "tokens of one row have different weights",
    smoothed: "not that of its cross entropy",
    tempered: "not that of its cross entropy",
    normalised: "not that of its cross entropy",
    penalised: "it has other terms",
    later_tokens: "tokens of one row have different weights",
    hardest_rows: "a row has no weight",
}


@pytest.mark.parametrize("loss", REFUSED)
@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_what_is_no_sum_of_the_rows_losses_is_refused(base, loss, tmp_path, tokenizer):
    model = certain(tokenizer, output_hidden_states=loss is penalised)
    with pytest.raises(InputError, match=f"{REFUSED[loss]}.*Pass when='before'") as error:
        trained(of_class(base, loss), tmp_path, tokenizer, model)
    assert "\n" not in str(error.value)


def test_prompts_that_are_learnt_are_seen(tmp_path, tokenizer):
    class Everything(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
            ids = inputs["input_ids"]
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
            return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum") / num_items_in_batch

    with pytest.raises(InputError, match="label is -100 have a loss"):
        trained(Everything, tmp_path, tokenizer)


def test_a_loss_from_hidden_states_is_seen(tmp_path, tokenizer):
    class Chunked(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
            outputs = model(input_ids=inputs["input_ids"], output_hidden_states=True)
            logits = model.lm_head(outputs.hidden_states[-1])[:, :-1].transpose(1, 2)
            return F.cross_entropy(logits, inputs["labels"][:, 1:], reduction="sum") / num_items_in_batch

    with pytest.raises(InputError, match="not computed from the logits or the loss that the model returns"):
        trained(Chunked, tmp_path, tokenizer)


def test_nothing_is_stepped_before_a_loss_is_refused(tmp_path, tokenizer):
    model = certain(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError):
        trained(Trainer, tmp_path, tokenizer, model, loss=focal, learning_rate=1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_remedy_works(tmp_path, tokenizer):
    trainer = of_class(Trainer, focal)
    callback = ResonanceCallback(keep=0.5, when="before")
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer(llama(len(tokenizer)), args, pad, tokens(tokenizer), callbacks=[callback]).train()
    assert callback.selections[0].keep.sum() == 8


# ---- no alarm: what transformers and TRL do


@pytest.fixture(autouse=True)
def _own_weights_are_no_warning_elsewhere():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in its own way.*")
        warnings.filterwarnings("ignore", message=".*no row is ever dropped.*")
        yield


USUAL = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "one row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "clipping": {"max_grad_norm": 1e-3},
    "neftune": {"neftune_noise_alpha": 5.0},
    "own average": {"average_tokens_across_devices": False},
}
NOT_THE_ROWS_OWN = ("bfloat16", "neftune")  # noise: the scores are those of other numbers


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
@pytest.mark.parametrize("name", USUAL)
def test_the_usual_losses_raise_no_alarm(name, base, tmp_path, tokenizer):
    changes = dict(USUAL[name])
    if base is SFTTrainer and changes.pop("gradient_checkpointing", False):
        changes["activation_checkpointing"] = True
    found = trained(base, tmp_path, tokenizer, **changes)
    if name not in NOT_THE_ROWS_OWN:
        assert_right(*found)


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_label_smoothing_is_measured_as_it_is_trained(base, tmp_path, tokenizer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # TRL deprecates it
        loss = {"loss_type": "nll"} if base is SFTTrainer else {}  # TRL 1.8's default fails with smoothing
        _, callback = trained(base, tmp_path, tokenizer, label_smoothing_factor=0.1, **loss)
    assert callback.scores.scored.all()
    _, plain = trained(base, tmp_path, tokenizer)
    assert not np.allclose(callback.scores.column("score"), plain.scores.column("score"), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dft"},
        {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2},
        {"padding_free": True, "max_length": None, "bf16": True, "pad_to_multiple_of": 8},
        {"peft": LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.2)},
        {"peft": LoraConfig(r=2, target_modules=["q_proj"]), "bf16": True, "activation_checkpointing": True},
        {"max_steps": 13, "gradient_accumulation_steps": 3},
        {"assistant_only_loss": False, "completion_only_loss": False},
    ],
    ids=["dft", "padding-free", "padding-free in bfloat16", "lora", "lora in bfloat16", "max_steps", "all tokens"],
)
def test_sft_raises_no_alarm_while_rows_are_dropped(changes, tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), **changes)
    assert outcome.callback.scores.scored.all()


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": SoftPruning(keep=0.5), "readmit": True},
        {"token_cleaning": TokenCleaning(0.6, parts=2), "keep": 0.5},
    ],
    ids=["weights", "tokens"],
)
def test_weights_and_masks_of_the_run_itself_raise_no_alarm(settings, tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(**settings), gradient_accumulation_steps=2)
    assert outcome.callback.scores.scored.all()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("bf16", [False, True])
def test_families_raise_no_alarm(family, bf16, tmp_path, tokenizer):
    """With dropout, caps and scales of logits, and routers."""
    model = tiny(family, vocab_size=len(tokenizer))
    trained(Trainer, tmp_path, tokenizer, model, bf16=bf16)
    trained(SFTTrainer, tmp_path, tokenizer, model, bf16=bf16)


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_a_routers_loss_raises_no_alarm(base, tmp_path, tokenizer):
    model = tiny("mixtral", vocab_size=len(tokenizer))
    model.config.output_router_logits = True
    trained(base, tmp_path, tokenizer, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_raise_no_alarm(dtype, tmp_path, tokenizer):
    trained(Trainer, tmp_path, tokenizer, llama(len(tokenizer)).to(dtype))


class WithoutLogits(LlamaForCausalLM):
    """As a model with a fused loss: it returns the loss alone."""

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        return CausalLMOutput(loss=outputs.loss)


def test_a_fused_loss_is_compared_as_a_whole(tmp_path, tokenizer):
    model = certain(tokenizer)
    model.__class__ = WithoutLogits
    trained(Trainer, tmp_path / "1", tokenizer, model, gradient_accumulation_steps=2)

    class Doubled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    with pytest.warns(UserWarning, match="2 times"):
        trainer, callback = trained(Doubled, tmp_path / "2", tokenizer, model)
    model.__class__ = LlamaForCausalLM
    assert_right(trainer, callback)


def test_a_step_that_broke_raises_no_alarm(tmp_path, tokenizer):
    """Losses that are not finite are reported as scores that are not."""
    model = certain(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    trained(Trainer, tmp_path, tokenizer, model, max_grad_norm=0)


def test_a_loss_that_leaves_out_the_routers_is_measured_without_it(tmp_path, tokenizer):
    model = tiny("mixtral", vocab_size=len(tokenizer), output_router_logits=True, router_aux_loss_coef=0.5)
    trainer, callback = trained(Trainer, tmp_path, tokenizer, model, loss=batch_mean)
    assert_right(trainer, callback)

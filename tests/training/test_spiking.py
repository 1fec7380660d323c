"""Steps that stand out while a run trains: who is told, and the update that is left out."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.run_ledgers import Unrounded, lines, parts_of
from helpers.tables import make_provenance
from helpers.training import InOrder, arguments, llama
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from resofilter_trainer import InputError, Ledger, ResonanceCallback, ScoreTable
from resofilter_trainer.training.checkpoints import warn_of_other_skipping
from resofilter_trainer.training.recording import SPIKES
from resofilter_trainer.training.refused_uses import RULE_IN_BACKWARD, check_skipping
from resofilter_trainer.training.resuming import resumed
from resofilter_trainer.training.spiking import SpikeWatch
from resofilter_trainer.training.trainer_patches import UpdatePatch

GARBAGE, STEP = 50, 26  # the row, and its step in batches of two
USUAL = {"prompt": "question: what is 1 + 1 ?", "completion": " answer: 2 fox fox fox"}
ROWS = Dataset.from_list(
    [{**USUAL, "completion": " lazy jumps dog over brown"} if row == GARBAGE else USUAL for row in range(60)]
)
ARGS = SimpleNamespace(optim="adamw_torch", process_index=0)
TRAINER = SimpleNamespace(args=ARGS, train_dataset=None, is_deepspeed_enabled=False)
SETTINGS = {"num_train_epochs": 1, "learning_rate": 3e-2, "save_strategy": "no"}


def run(output: Path, tokenizer, resume=None, callbacks=(), answer=None, **settings):
    """A run on rows in their order; the trainer, the callback, what is logged, and the steps that stood out."""
    seen = []
    of_trainer = ("save_steps", "save_strategy", "per_device_train_batch_size")
    changes = {name: settings.pop(name) for name in [*settings] if name in of_trainer}

    def on_spike(step):
        seen.append(step)
        return answer

    callback = ResonanceCallback(keep=1.0, **{"on_spike": on_spike, **settings})
    args = arguments(output, **{**SETTINGS, **changes})
    trainer = InOrder(
        llama(len(tokenizer)), args, None, ROWS, processing_class=tokenizer, callbacks=[callback, *callbacks]
    )
    logged = Unrounded(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(trainer=trainer, callback=callback, logged=logged, seen=seen)


class States(TrainerCallback):
    """The weights, and the optimizer's state, after each step."""

    def __init__(self) -> None:
        self.after: dict[int, list[torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = kwargs["optimizer"].state_dict()["state"]
        numbers = [value for own in optimizer.values() for value in own.values() if isinstance(value, torch.Tensor)]
        weights = [*kwargs["model"].state_dict().values()]
        self.after[state.global_step] = [each.clone() for each in (*weights, *numbers)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))


def test_the_function_is_told_of_the_step_and_of_the_row_behind_it(tmp_path, tokenizer):
    found = run(tmp_path, tokenizer)
    (spike,) = found.seen
    assert (spike.step, spike.by) == (STEP, "loss")
    assert [row.sample_id for row in spike.rows] == [GARBAGE, GARBAGE + 1]
    assert spike.rows[0].text == (ROWS[GARBAGE]["prompt"], ROWS[GARBAGE]["completion"] + tokenizer.eos_token)
    np.testing.assert_allclose(spike.loss, found.logged.column("loss")[STEP - 1], rtol=1e-6)
    np.testing.assert_allclose(spike.grad_norm, found.logged.column("grad_norm")[STEP - 1], rtol=1e-6)
    np.testing.assert_allclose(spike.usual_loss, np.median(found.logged.column("loss")[: STEP - 1]), rtol=1e-6)
    own = lines(tmp_path).query("step == @STEP").set_index("sample_id")
    shares = own["weight"] * own["loss"] / (own["weight"] * own["loss"]).sum()
    layers = own[[name for name in own if name.startswith("layer_")]].mean(axis=1)
    of_update = own["weight"] * layers / (own["weight"] * layers).sum()
    for row in spike.rows:
        assert row.num_tokens == own["num_tokens"][row.sample_id]
        np.testing.assert_allclose(row.loss, own["loss"][row.sample_id], rtol=1e-6)
        np.testing.assert_allclose(row.share_of_loss, shares[row.sample_id], rtol=1e-5)
        np.testing.assert_allclose(row.share_of_update, of_update[row.sample_id], rtol=1e-5)
    assert spike.rows[0].share_of_loss > 0.8


def test_a_function_that_returns_nothing_changes_nothing(tmp_path, tokenizer):
    found = run(tmp_path / "with", tokenizer)
    args = arguments(tmp_path / "without", **SETTINGS)
    without = InOrder(llama(len(tokenizer)), args, None, ROWS, processing_class=tokenizer)
    without.train()
    assert len(found.seen) == 1
    for name, weight in without.model.state_dict().items():
        assert torch.equal(weight, found.trainer.model.state_dict()[name]), name


@pytest.mark.parametrize("how", ["skip_update", "answer"])
def test_an_update_that_is_left_out_leaves_weights_and_optimizer_as_they_were(how, tmp_path, tokenizer, capsys):
    states, settings = States(), {"skip_update": True} if how == "skip_update" else {"answer": "skip"}
    found = run(tmp_path, tokenizer, callbacks=[states], **settings)
    assert [each.step for each in found.seen] == [STEP]
    assert same(states.after[STEP], states.after[STEP - 1])
    assert not any(same(states.after[step], states.after[step - 1]) for step in range(2, 31) if step != STEP)
    assert found.trainer.state.global_step == 30
    rates = found.logged.column("learning_rate")
    np.testing.assert_allclose(rates, 3e-2 * (1 - np.arange(30) / 30), rtol=1e-6)  # the schedule goes on
    assert type(found.trainer.optimizer.step).__name__ != "_Replaced"
    entries = [each for each in found.callback.log_history if "resofilter/updates_left_out" in each]
    assert [(each["step"], each["resofilter/updates_left_out"]) for each in entries] == [(STEP, 1.0)]
    assert f"step {STEP} stands out: loss" in (said := capsys.readouterr().out)
    assert f"rows {GARBAGE}, {GARBAGE + 1}; its update is left out (1 so far)" in said
    own = lines(tmp_path)
    assert own[own["left_out"]]["sample_id"].tolist() == [GARBAGE, GARBAGE + 1]
    ledger = Ledger.load(tmp_path)
    assert ledger.step(STEP)["left_out"].tolist() == [True, True]
    assert ledger.steps().query("left_out")["step"].tolist() == [STEP]


@pytest.mark.slow
def test_a_run_that_leaves_out_updates_resumes_exactly(tmp_path, tokenizer):
    """Before the step, just before it, and after it: its window of steps is in the checkpoint."""
    settings = {"skip_update": True, "save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path, tokenizer, **settings)
    files = {path: path.read_bytes() for path in parts_of(tmp_path)}
    for step, seen in ((5, 1), (25, 1), (30, 0)):
        resumed = run(tmp_path, tokenizer, resume=str(tmp_path / f"checkpoint-{step}"), **settings)
        assert len(resumed.seen) == seen
        for name, weight in whole.trainer.model.state_dict().items():
            assert torch.equal(weight, resumed.trainer.model.state_dict()[name]), (step, name)
        assert resumed.callback.log_history == whole.callback.log_history
        assert resumed.trainer.state.stateful_callbacks == whole.trainer.state.stateful_callbacks
        assert {path: path.read_bytes() for path in parts_of(tmp_path)} == files


@pytest.mark.slow
def test_a_run_may_resume_to_get_past_a_spike_and_says_so(tmp_path, tokenizer):
    plain = run(tmp_path, tokenizer, save_strategy="steps", save_steps=10)
    assert plain.trainer.state.stateful_callbacks["resofilter"]["settings"]["on_spike"] == "run.<locals>.on_spike"
    said = r"checkpoint-10' is of a run that differs in skip_update \(None / True\) \(there / here\)\. Later steps"
    with pytest.warns(UserWarning, match=said):
        found = run(tmp_path, tokenizer, resume=str(tmp_path / "checkpoint-10"), skip_update=True)
    assert Ledger.load(tmp_path).steps().query("left_out")["step"].tolist() == [STEP]
    of_run = ScoreTable.load(tmp_path / "resofilter").provenance.preparation["run"]
    assert of_run["skip_update"] is True
    assert found.trainer.state.stateful_callbacks["resofilter"]["settings"]["skip_update"] is True


def test_a_function_is_known_by_its_name(capsys):
    class Watcher:
        def look(self, step):
            pass

        __call__ = look

    names = [(print, "print"), ([].append, "list.append"), (partial(print, 1), "partial")]
    names += [(Watcher().look, "test_a_function_is_known_by_its_name.<locals>.Watcher.look")]
    names += [(Watcher(), "test_a_function_is_known_by_its_name.<locals>.Watcher")]
    for function, name in names:
        assert SpikeWatch(TRAINER, function, False, None).settings == {"on_spike": name}
    assert SpikeWatch(TRAINER, None, False, None).settings == {}
    assert SpikeWatch(TRAINER, None, True, None).settings == {"skip_update": True}


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({}, {}, None),
        ({}, {"on_spike": "look"}, "on_spike (None / look)"),
        ({"on_spike": "look"}, {"on_spike": "look"}, None),
        ({"on_spike": "look"}, {}, "on_spike (look / None)"),
        ({"skip_update": True}, {"on_spike": "look"}, "on_spike (None / look); skip_update (True / None)"),
    ],
)
def test_what_a_run_that_resumes_does_otherwise_is_said_and_recorded(there, here, said, tmp_path):
    before = make_provenance(preparation={"run": {"epochs": 3, "keep": 1, **there}})
    settings = {"epochs": 3, "keep": 1}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        saved = {"settings": {**settings, **there}, SPIKES: {}}
        warn_of_other_skipping(TRAINER, tmp_path, saved, {**settings, **here})
    assert len(found) == (said is not None)
    assert said is None or f"differs in {said} (there / here)" in str(found[0].message)
    after = resumed(before, {**settings, **there}, {**settings, **here})
    assert after.preparation["run"] == {**settings, **here}


def test_a_checkpoint_that_is_older_than_such_settings_has_no_other_ones(tmp_path, recwarn):
    warn_of_other_skipping(TRAINER, tmp_path, {"settings": {}}, {"on_spike": "look", "skip_update": True})
    assert not recwarn


def test_an_update_that_is_left_out_is_no_measurement_of_the_optimizer(tmp_path, tokenizer):
    found = run(tmp_path, tokenizer, skip_update=True, update="optimizer", per_device_train_batch_size=1)
    out = [each.step for each in found.seen]
    assert GARBAGE + 1 in out
    assert np.isnan(found.seen[out.index(GARBAGE + 1)].rows[0].share_of_update)  # not known before the step
    own = lines(tmp_path)
    layers = [name for name in own if name.startswith("layer_")]
    assert own[own["step"].isin(out)][layers].isna().all(axis=None)
    assert own[~own["step"].isin(out)][layers].notna().all(axis=None)
    assert own["loss"].notna().all()
    missing = [row for row, why in enumerate(found.callback.scores.reasons) if why == "not measured yet"]
    assert missing == [step - 1 for step in out]


def test_a_function_can_stop_the_training(tmp_path, tokenizer):
    found = run(tmp_path, tokenizer, answer="stop")
    assert found.trainer.state.global_step == STEP
    assert lines(tmp_path)["step"].max() == STEP
    assert found.callback.scores is not None


def test_other_answers_are_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"on_spike returned 7: return None, 'stop' or 'skip'\."):
        run(tmp_path, tokenizer, answer=7)


def test_arguments_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="on_spike must be a function of a step that stands out, got 'skip'"):
        ResonanceCallback(on_spike="skip")
    with pytest.raises(InputError, match="leave out when='before'"):
        ResonanceCallback(skip_update=True, when="before")


@pytest.mark.parametrize("optim", ["lomo", *map(OptimizerNames, ("lomo", "adalomo", "galore_adamw_layerwise"))])
def test_an_optimizer_that_steps_in_the_backward_has_no_update_to_leave_out(optim):
    trainer = SimpleNamespace(args=SimpleNamespace(optim=optim), train_dataset=None, is_deepspeed_enabled=False)
    with pytest.raises(InputError, match=r"an optimizer that steps in the backward, such as LOMO.* Return 'stop'"):
        check_skipping(trainer)
    assert RULE_IN_BACKWARD.refused(trainer, None)
    trainer.args.optim = "adamw_torch"
    check_skipping(trainer)
    assert not RULE_IN_BACKWARD.refused(trainer, None)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(InputError, match="DeepSpeed"):
        check_skipping(trainer)


def test_after_an_overflow_the_learning_rate_goes_on_where_an_update_is_left_out():
    """Accelerate keeps the learning rate after a step that fp16 left out; a later one must not seem to be it."""
    scaler = SimpleNamespace(update=lambda: None)
    accelerator = SimpleNamespace(scaler=scaler, unscale_gradients=lambda optimizer: None)
    optimizer = SimpleNamespace(_is_overflow=True)
    UpdatePatch(SimpleNamespace(accelerator=accelerator, optimizer=optimizer)).leave_out()
    optimizer.step()
    assert optimizer._is_overflow is False
    assert not hasattr(optimizer, "step"), "only one step is left out, whatever ends the training after it"

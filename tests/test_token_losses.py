"""What a model loses on every token: the same whatever the pieces, the batches, the padding and the interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from samples import Sample, collate, make_samples
from torch.nn import functional as F
from training import arguments, llama, rows

from resofilter_trainer import loss_pass
from resofilter_trainer.config import InputError
from resofilter_trainer.loss_pass import Parts, measure_token_losses, split_by_tokens
from resofilter_trainer.losses import token_losses, token_losses_in_pieces
from resofilter_trainer.preparation import PreparedRows, prepare, prepared_already

VOCAB = 128


def plain_losses(model, samples: list[Sample]) -> torch.Tensor:
    """One sample alone after another, all logits, no padding."""
    losses = []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1].float()
        each = F.cross_entropy(logits, sample["labels"][1:], reduction="none", ignore_index=-100)
        losses.append(each[sample["labels"][1:] != -100])
    return torch.cat(losses)


def state_of(model) -> list[object]:
    """All that could be left behind on a model."""
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        found.append((name, type(module), module.training, "forward" in vars(module), [list(each) for each in hooks]))
    return found


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many logits each cross entropy was given."""
    seen: list[int] = []
    real = F.cross_entropy

    def spy(logits, *args, **kwargs):
        seen.append(logits.numel())
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", spy)
    return seen


# ---- in pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_what_the_whole_gives(family):
    model = tiny(family)
    batch = collate(make_samples(3, VOCAB), "left" if family == "cpmant" else "right")
    with torch.no_grad():
        whole = token_losses(model, batch)
    before = state_of(model)  # big_bird changes its attention in its first forward
    pieces = token_losses_in_pieces(model, batch, VOCAB * 5)
    assert len(pieces) == int((batch["labels"][:, 1:] != -100).sum()) > 5
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "cohere", "granite", "bart"])
def test_no_more_logits_are_held_than_asked(family, sizes):
    batch = collate(make_samples(4, VOCAB))
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    token_losses_in_pieces(tiny(family), batch, VOCAB * 5 + 7)
    assert max(sizes) == VOCAB * 5
    assert sum(sizes) == VOCAB * learnt


def test_the_decoder_runs_once_however_many_pieces():
    model, calls = tiny("llama"), []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    token_losses_in_pieces(model, collate(make_samples(4, VOCAB)), VOCAB)
    assert len(calls) == 1


def test_a_head_too_large_for_the_budget_still_gives_one_token_at_a_time(sizes):
    model, batch = tiny("llama"), collate(make_samples(2, VOCAB))
    torch.testing.assert_close(
        token_losses_in_pieces(model, batch, 1), token_losses(model, batch).detach(), rtol=0, atol=1e-5
    )
    assert max(sizes[:-1]) == VOCAB


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pieces_are_what_each_sample_loses_alone(family, side):
    model, samples = tiny(family), make_samples(5, VOCAB)
    found = token_losses_in_pieces(model, collate(samples, side), VOCAB * 3)
    torch.testing.assert_close(found, plain_losses(model, samples), rtol=0, atol=1e-5)


def test_pieces_of_a_model_with_an_adapter():
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    model.eval()
    before, samples = state_of(model), make_samples(4, VOCAB)
    found = token_losses_in_pieces(model, collate(samples), VOCAB * 3)
    torch.testing.assert_close(found, plain_losses(model, samples), rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (found - plain_losses(model, samples)).abs().max() > 1e-3
    assert state_of(model) == before


def test_a_forward_of_the_users_own_is_put_back():
    model, batch = tiny("llama"), collate(make_samples(3, VOCAB))
    truth = token_losses(model, batch).detach()
    own = model.model.forward
    model.model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    wrapped = model.model.forward
    torch.testing.assert_close(token_losses_in_pieces(model, batch, VOCAB * 2), truth, rtol=0, atol=1e-5)
    assert model.model.forward is wrapped


def test_nothing_is_left_behind_by_a_failure(monkeypatch):
    model, batch = tiny("llama"), collate(make_samples(3, VOCAB))
    before = state_of(model)

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    for place in (model.lm_head, model.model.layers[1]):
        with monkeypatch.context() as patch:
            patch.setattr(place, "forward", fail)
            with pytest.raises(RuntimeError, match="no"):
                token_losses_in_pieces(model, batch, VOCAB * 2)
        assert state_of(model) == before


def test_without_a_learnt_token_there_are_no_losses():
    batch = collate(make_samples(3, VOCAB))
    batch["labels"][:] = -100
    assert token_losses_in_pieces(tiny("llama"), batch, VOCAB * 2).shape == (0,)


# ---- batches


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_row_once_within_the_budget_longest_first(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    batches = split_by_tokens(lengths, budget)
    assert sorted(np.concatenate([[], *batches]).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert longest[:1] == [lengths.max()] if len(lengths) else longest == []


# ---- the pass


@pytest.fixture(scope="module")
def prepared(tokenizer) -> PreparedRows:
    return prepare(rows(23).add_column("resofilter_row", np.arange(23) * 5 + 2), tokenizer, arguments(Path("unused")))


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer))


@pytest.fixture(scope="module")
def truth(prepared, model) -> np.ndarray:
    samples = prepared.dataset.with_format("torch")
    return plain_losses(model.eval(), list(samples)).numpy()


def measure(model, prepared, budget: int = 64, parts: Parts | None = None) -> np.ndarray:
    return measure_token_losses(model, prepared, arguments(Path("unused")), budget, "losses", parts)


@pytest.fixture
def batches_done(monkeypatch) -> list[tuple[int, ...]]:
    """The rows of every batch that is computed; `stop_after` batches, an interrupt."""
    done: list[tuple[int, ...]] = []
    real = loss_pass._losses_of

    def spy(model, dataset, rows, args):
        losses = real(model, dataset, rows, args)
        done.append(tuple(rows.tolist()))
        return losses

    monkeypatch.setattr(loss_pass, "_losses_of", spy)
    return done


def interrupt(monkeypatch, after: int) -> None:
    """Let the next pass be interrupted once so many batches are done."""
    real, count = loss_pass._losses_of, iter(range(after))

    def stop(*args):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loss_pass, "_losses_of", stop)


@pytest.mark.parametrize("budget", [1, 100, 128, 100_000])
def test_losses_are_those_of_each_row_alone_whatever_the_budget(budget, model, prepared, truth):
    found = measure(model, prepared, budget)
    assert found.dtype == np.float32
    assert len(found) == prepared.num_tokens.sum()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)


def test_losses_are_the_same_when_few_logits_fit(model, prepared, truth, sizes, monkeypatch):
    monkeypatch.setattr(loss_pass, "MOST_LOGITS", model.config.vocab_size * 7)
    np.testing.assert_allclose(measure(model, prepared), truth, rtol=0, atol=1e-5)
    assert max(sizes) <= model.config.vocab_size * 7


@pytest.mark.parametrize("save_every", [0.0, 3600.0])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_pass_goes_on(after, save_every, model, prepared, tmp_path, batches_done, monkeypatch):
    whole = measure(model, prepared)
    everything = list(batches_done)
    assert len(everything) > 5
    monkeypatch.setattr(loss_pass, "SAVE_EVERY", save_every)
    parts = Parts(tmp_path / "parts", "key")
    with monkeypatch.context() as patch:
        batches_done.clear()
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            measure(model, prepared, parts=parts)
    assert batches_done == everything[:after]

    found = measure(model, prepared, parts=parts)
    assert batches_done == everything  # each once, in both together
    assert found.tobytes() == whole.tobytes()
    again = measure(model, prepared, parts=parts)
    assert batches_done == everything
    assert again.tobytes() == whole.tobytes()


def test_what_was_done_is_not_lost_when_it_is_interrupted_twice(model, prepared, tmp_path, batches_done, monkeypatch):
    whole = measure(model, prepared)
    everything = list(batches_done)
    batches_done.clear()
    for after in (2, 1, 2):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(KeyboardInterrupt):
                measure(model, prepared, parts=Parts(tmp_path, "key"))
    assert measure(model, prepared, parts=Parts(tmp_path, "key")).tobytes() == whole.tobytes()
    assert batches_done == everything


def test_a_kill_costs_no_more_than_what_was_not_yet_saved(model, prepared, tmp_path, batches_done, monkeypatch):
    monkeypatch.setattr(loss_pass, "SAVE_EVERY", 0.0)
    measure(model, prepared, parts=Parts(tmp_path, "key"))
    assert len(list(tmp_path.glob("part-*.arrow"))) == len(batches_done)


def test_parts_of_something_else_are_not_used(model, prepared, truth, tmp_path, tokenizer):
    other = llama(len(tokenizer), seed=1)
    measure(other, prepared, parts=Parts(tmp_path, "other"))
    found = measure(model, prepared, parts=Parts(tmp_path, "key"))
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)


def test_a_part_that_is_cut_off_is_refused_in_one_line(model, prepared, tmp_path):
    measure(model, prepared, parts=Parts(tmp_path, "key"))
    (path,) = tmp_path.glob("part-*.arrow")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="cut off") as refused:
        measure(model, prepared, parts=Parts(tmp_path, "key"))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_loss_that_is_not_finite_names_the_row_as_the_user_counts(prepared, tokenizer):
    broken = llama(len(tokenizer))
    token = tokenizer(" fox")["input_ids"][-1]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = torch.nan
    without = [number for number, ids in enumerate(prepared.dataset["input_ids"]) if token not in ids[:-1]]
    assert 0 < len(without) < len(prepared.lengths)
    measure(broken, prepared.select(np.array(without)))  # nothing wrong with these
    number = next(number for number in range(len(prepared.lengths)) if number not in without)
    with pytest.raises(InputError, match="not finite") as refused:
        measure(broken, prepared.select(np.array([*without, number])), 100_000)
    assert f"Row {prepared.sample_ids[number]} " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_mode_and_random_state_are_left_as_found_and_dropout_is_off(prepared, tokenizer):
    model = llama(len(tokenizer), attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before, weights = state_of(model), [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(7)
    random = torch.get_rng_state()
    one, two = (measure(model, prepared) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))


def test_rows_without_a_learnt_token_take_no_place(model, tokenizer):
    ids = tokenizer("question: what is 1 + 2 ?")["input_ids"]
    masked = [-100] * len(ids)
    labels = [masked, ids, masked, [-100, *ids[1:-1], -100], [ids[0], *masked[1:]]]
    rows = prepared_already(Dataset.from_dict({"input_ids": [ids] * 5, "labels": labels}), None)
    found = measure(model, rows, 2 * len(ids))
    samples = list(rows.dataset.with_format("torch"))
    np.testing.assert_allclose(found, plain_losses(model, samples).numpy(), rtol=0, atol=1e-5)
    assert len(found) == 2 * len(ids) - 3
    assert measure(model, rows.select(np.array([0, 2, 4]))).shape == (0,)

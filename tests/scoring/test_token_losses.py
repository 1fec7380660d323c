"""A model's loss on every token: the same whatever the batches, the tiles and the interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.samples import plain_losses, state_of, watch_logits
from helpers.training import arguments, llama, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.data.preparation import PreparedRows, prepare, prepared_already
from resofilter_trainer.model import head
from resofilter_trainer.scoring import passes
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.scoring.batches import split_by_tokens
from resofilter_trainer.scoring.passes import Parts
from resofilter_trainer.scoring.token_losses import measure_token_losses

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


def parts_in(folder: Path, key: str = "key") -> Parts:
    return Parts(folder, "token losses", {"weights": key})


@pytest.fixture
def batches_done(monkeypatch) -> list[tuple[int, ...]]:
    """The rows of every batch that a pass starts to measure."""
    done: list[tuple[int, ...]] = []
    real = loss_pass.collate

    def spy(prepared, rows, device):
        done.append(tuple(rows.tolist()))
        return real(prepared, rows, device)

    monkeypatch.setattr(loss_pass, "collate", spy)
    return done


def interrupt(monkeypatch, after: int) -> None:
    """Interrupt the next pass after some batches."""
    real, count = loss_pass.collate, iter(range(after))

    def stop(*args):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loss_pass, "collate", stop)


@pytest.mark.parametrize("budget", [1, 100, 128, 100_000])
def test_losses_are_those_of_each_row_alone_whatever_the_budget(budget, model, prepared, truth):
    found = measure(model, prepared, budget)
    assert found.dtype == np.float32
    assert len(found) == prepared.num_tokens.sum()
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)


def test_losses_are_the_same_when_few_logits_fit(model, prepared, truth, monkeypatch):
    logits_held = watch_logits(monkeypatch)
    most = model.config.vocab_size * 7
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", most)
    monkeypatch.setattr(head, "PIECE_LOGITS", most)
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    np.testing.assert_allclose(measure(model, prepared), truth, rtol=0, atol=1e-5)
    assert 0 < max(logits_held) <= most


@pytest.mark.parametrize("save_every", [0.0, 3600.0])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_pass_resumes(after, save_every, model, prepared, tmp_path, batches_done, monkeypatch):
    whole = measure(model, prepared)
    everything = list(batches_done)
    assert len(everything) > 5
    monkeypatch.setattr(passes, "LEAST_LOST", save_every)
    parts = parts_in(tmp_path / "parts")
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


def test_a_pass_that_is_interrupted_repeatedly_loses_nothing(model, prepared, tmp_path, batches_done, monkeypatch):
    whole = measure(model, prepared)
    everything = list(batches_done)
    batches_done.clear()
    for after in (2, 1, 2):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(KeyboardInterrupt):
                measure(model, prepared, parts=parts_in(tmp_path))
    assert measure(model, prepared, parts=parts_in(tmp_path)).tobytes() == whole.tobytes()
    assert batches_done == everything


def test_a_kill_costs_no_more_than_what_is_not_yet_saved(model, prepared, tmp_path, batches_done, monkeypatch):
    monkeypatch.setattr(passes, "LEAST_LOST", 0.0)
    monkeypatch.setattr(passes, "LOST_SHARE", 0.0)
    real, saved = passes._Results.add, []

    def add(self, number, results) -> None:
        real(self, number, results)
        saved.append(len(self._store.done()))

    monkeypatch.setattr(passes._Results, "add", add)
    measure(model, prepared, parts=parts_in(tmp_path))
    assert saved == [*range(1, len(batches_done) + 1)]
    assert len(list(tmp_path.glob("part-*.parquet"))) == 1


def test_parts_of_something_else_are_refused(model, prepared, tmp_path, tokenizer):
    measure(llama(len(tokenizer), seed=1), prepared, parts=parts_in(tmp_path, "other"))
    with pytest.raises(InputError, match=r"holds token losses made from something else.*weights \(other / key\)"):
        measure(model, prepared, parts=parts_in(tmp_path))
    with pytest.raises(InputError, match="batches"):
        measure(model, prepared, budget=100, parts=parts_in(tmp_path, "other"))


def test_a_truncated_part_is_refused_in_one_line(model, prepared, tmp_path):
    measure(model, prepared, parts=parts_in(tmp_path))
    (path,) = tmp_path.glob("part-*.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="is damaged") as refused:
        measure(model, prepared, parts=parts_in(tmp_path))
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


def test_rows_without_a_learnt_token_have_no_losses(model, tokenizer):
    ids = tokenizer("question: what is 1 + 2 ?")["input_ids"]
    masked = [-100] * len(ids)
    labels = [masked, ids, masked, [-100, *ids[1:-1], -100], [ids[0], *masked[1:]]]
    rows = prepared_already(Dataset.from_dict({"input_ids": [ids] * 5, "labels": labels}), None)
    found = measure(model, rows, 2 * len(ids))
    samples = list(rows.dataset.with_format("torch"))
    np.testing.assert_allclose(found, plain_losses(model, samples).numpy(), rtol=0, atol=1e-5)
    assert len(found) == 2 * len(ids) - 3
    assert measure(model, rows.select(np.array([0, 2, 4]))).shape == (0,)

"""The entropy of the most probable tokens, from the tiles of SFTTrainer's losses, against all logits at once."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers.training import arguments, llama, rows, train
from helpers.versions import skip_without
from trl import SFTTrainer

from resofilter_trainer import InputError, TokenWeights
from resofilter_trainer.model.losses import vocabulary_of
from resofilter_trainer.training.top_tiles import BLOCK, KERNEL, TopTiles, largest


class Launched:
    """What Triton would launch, computed by TRL's version for devices without it."""

    def __init__(self, fold) -> None:
        self._fold = fold

    def __getitem__(self, grid):
        return self._fold


def plain(logits: torch.Tensor) -> torch.Tensor:
    """The formula, on all logits."""
    p = logits.double().topk(20).values.softmax(-1)
    return -(p * p.log()).sum(-1)


@pytest.fixture
def patched(tokenizer, tmp_path):
    """A model as SFTTrainer has patched it, with a batch of two rows."""
    skip_without("tiles of log_probs")
    model = llama(len(tokenizer), hidden_size=32)
    model.config.final_logit_softcapping, model.config.logit_scale = 3.0, 2.0
    torch.nn.init.normal_(model.lm_head.weight)
    trainer = SFTTrainer(model, arguments(tmp_path), train_dataset=rows(5), processing_class=tokenizer)
    return model, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("on_gpu", [False, True], ids=["all positions", "learnt positions, as with Triton"])
@pytest.mark.parametrize("tiles", [False, True], ids=["one tile", "tiles of tokens and of the vocabulary"])
def test_it_is_that_of_all_logits(tiles, on_gpu, patched, monkeypatch):
    model, batch = patched
    kernel, utils = importlib.import_module(KERNEL), importlib.import_module("trl.trainer.utils")
    if on_gpu:
        monkeypatch.setattr(kernel, "_forward_kernel", Launched(kernel._forward_tile))
        for each in (kernel, utils):
            monkeypatch.setattr(each, "_use_triton", lambda device: True)
    if tiles:
        monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 7)
        monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 50)
    top, learnt = TopTiles(vocabulary_of(model)), batch["labels"][:, 1:] != -100
    inside = (kernel._forward_tile, kernel._forward_kernel)
    with torch.no_grad(), top.listening():
        top.begin(learnt)
        output = model(**batch, fused_lm_head=True)
        found = top.take()
    assert (kernel._forward_tile, kernel._forward_kernel) == inside
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = 3 * torch.tanh(2 * (hidden[:, :-1] @ model.lm_head.weight.T) / 3)[learnt]
    torch.testing.assert_close(found.double(), plain(logits), rtol=1e-5, atol=1e-6)
    targets = batch["labels"][:, 1:][learnt]
    own = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
    torch.testing.assert_close(output.log_probs[learnt], own, rtol=1e-5, atol=1e-5)


def test_a_head_that_computes_otherwise_is_refused(patched):
    model, batch = patched
    top = TopTiles(vocabulary_of(model) + 1)
    with torch.no_grad(), top.listening():
        top.begin(batch["labels"][:, 1:] != -100)
        model(**batch, fused_lm_head=True)
        with pytest.raises(InputError, match="the installed TRL computes its losses in another way"):
            top.take()


@pytest.mark.parametrize("size", [5, 300, 40 * BLOCK, 40 * BLOCK + 1, 100 * BLOCK + 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_those_of_all(size, dtype):
    """Also of a tile that is a part of a wider one, where many are equal, as those of bfloat16 are."""
    torch.manual_seed(0)
    tile = torch.randn(30, size + 9).to(dtype)[:, :size]
    tile[3, :2] = tile[3].max()
    for rows_ in (None, torch.tensor([3, 7, 29]), torch.tensor([], dtype=torch.long)):
        of = tile if rows_ is None else tile[rows_]
        expected = of.topk(min(20, size)).values
        assert torch.equal(largest(tile, rows_).sort(1, descending=True).values, expected)


def test_eaft_in_a_run_weighs_by_it(tokenizer, tmp_path):
    """The step is the one written out, with the weights of the plain formula."""
    skip_without("tiles of log_probs")
    model = llama(len(tokenizer))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"optim": "sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0, "num_train_epochs": 1}
    settings |= {"per_device_train_batch_size": 5, "dataset": rows(5), "model": model}
    callback = TokenWeights("eaft")
    found = train(tmp_path, tokenizer, callback, **settings)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    model.eval()
    total, count, weight = 0.0, 0, 0.0
    for example in found.trainer.train_dataset:
        labels = torch.tensor(example["labels"])[1:]
        learnt = labels != -100
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1][learnt]
        weights = (plain(logits.detach()) / torch.tensor(20.0).log()).float()
        total = total + (weights * torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="none")).sum()
        count, weight = count + len(weights), weight + float(weights.sum())
    model.zero_grad()
    (total / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach() - 0.1 * parameter.grad, msg=name)
    assert callback.mean_weights == pytest.approx([weight / count])

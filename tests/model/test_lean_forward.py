"""What a lean forward skips changes nothing: positions, a shared prefix, float32 weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from helpers.families import FAMILIES, LAYERS, VOCAB, tiny
from helpers.samples import Sample, collate, error_over_spread, make_samples, record_all, state_of
from helpers.versions import older_than
from torch import nn

from resofilter_trainer import InputError, Recorder, Resonance, ResonanceConfig
from resofilter_trainer.model.losses import IGNORE, token_losses
from resofilter_trainer.model.modes import bfloat16_forward, own_precision
from resofilter_trainer.model.narrowing import Narrowing, position_by_position
from resofilter_trainer.model.up_projection import decoder_layers, find_up_projections

PROMISED = ["llama", "qwen3", "gemma2", "gpt2", "phi3", "opt", "mixtral"]
CONFIG = ResonanceConfig(n_layers=2)  # of three
PREFIX = 12
FIELDS = ("loss", "num_tokens", "layers")
# Without a cache of keys and values alone, or with another one.
NOT_SHARED: set[str] = set()
NOT_SHARED |= {"lfm3", "olmo_hybrid", "recurrent_gemma", "rwkv", "xlm", "openai-gpt", "cpmant", "xlstm", "bamba"}
NOT_SHARED |= {"falcon_h1", "qwen3_5_text", "gemma3n_text", "jamba", "minimax", "axk2", "deepseek_v32", "glm_moe_dsa"}
NOT_SHARED |= {"hy_v4", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "bailing_hybrid", "deepseek_v4"}
NOT_SHARED |= {"dots3_note_text", "granitemoehybrid", "inkling_text", "inkling2_text", "kimi_linear", "lfm2_moe"}
NOT_SHARED |= {"zaya"}
if older_than("transformers", "5.23"):
    NOT_SHARED |= {"moshi"}
    if older_than("transformers", "5.0"):
        NOT_SHARED |= {"electra"}  # its mask leaves out what is in the cache
    else:
        NOT_SHARED |= {"big_bird", "megatron-bert", "roformer", "rembert"}  # not causal there


def build(family: str, **overrides) -> nn.Module:
    return tiny(family, **overrides).double()


def last_blocks(model: nn.Module) -> list[nn.Module]:
    """The measured modules of the last layer."""
    return list({each.block: None for each in find_up_projections(model, 1)})


def some_ids(length: int = 16) -> torch.Tensor:
    return make_samples(1, VOCAB, length, length)[0]["input_ids"][None]


# ---- positions


@pytest.mark.parametrize("family", [*PROMISED, "cohere", "bart", "deepseek_v3"])
def test_learnt_positions_alone_give_and_receive_what_they_do_among_all(family):
    model, ids, index = build(family, tie_word_embeddings=False), some_ids(18).view(2, 9), torch.tensor([3, 4, 8, 17])
    narrowing = Narrowing(last_blocks(model))
    weights = torch.randn(len(index), VOCAB, dtype=torch.float64)
    parameters = list(decoder_layers(model)[1][0].parameters())

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[index]
        return logits.detach(), torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)

    with own_precision(model):
        whole, gradients = run()
        with narrowing.to(index, ids.numel()):
            found, narrow_gradients = run()
    assert narrowing.narrowed == set(last_blocks(model))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
    largest = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    for narrow, gradient in zip(narrow_gradients, gradients, strict=True):
        torch.testing.assert_close(narrow, gradient, rtol=1e-10, atol=1e-14 * largest)


def test_a_narrowed_module_sees_the_positions_and_gives_back_zeros_elsewhere():
    model, seen = build("llama"), []
    mlp = model.model.layers[-1].mlp
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with Narrowing([mlp]).to(torch.tensor([1, 7]), 10):
        found = mlp(hidden)
    whole = mlp(hidden)
    assert seen == [(1, 2, 32), (2, 5, 32)]
    assert found.shape == whole.shape
    torch.testing.assert_close(found[[0, 1], [1, 2]], whole[[0, 1], [1, 2]], rtol=1e-12, atol=0)
    assert not found.flatten(0, 1)[[0, 2, 3, 4, 5, 6, 8, 9]].any()


def test_where_every_position_is_learnt_nothing_is_narrowed():
    mlp = build("llama").model.layers[-1].mlp
    narrowing = Narrowing([mlp])
    with narrowing.to(torch.arange(10), 10):
        assert not mlp._forward_pre_hooks
        mlp(torch.randn(2, 5, 32, dtype=torch.float64))
    assert narrowing.narrowed == set()


def test_a_module_with_a_second_tensor_or_other_positions_is_left_alone():
    class Both(nn.Module):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return hidden + residual

    module, hidden = Both(), torch.randn(2, 5, 4)
    narrowing = Narrowing([module])
    with narrowing.to(torch.tensor([1]), 10):
        assert torch.equal(module(hidden, hidden), 2 * hidden)
        assert torch.equal(module(hidden, residual=hidden), 2 * hidden)
        assert torch.equal(module(hidden[:1], 1.0), hidden[:1] + 1)
    assert narrowing.narrowed == set()


def test_no_hook_outlives_a_narrowing():
    model = build("llama")
    before, blocks = state_of(model), last_blocks(model)
    with Narrowing(blocks).to(torch.tensor([1]), 10):
        assert state_of(model) != before
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="no"), Narrowing(blocks).to(torch.tensor([1]), 10):
        raise RuntimeError("no")
    assert state_of(model) == before


@pytest.mark.parametrize("family", [*PROMISED, "deepseek_v3", "gemma3_text"])
def test_the_last_feed_forward_works_position_by_position(family):
    model = tiny(family)
    before = state_of(model)
    assert all(position_by_position(model, each, some_ids()) for each in last_blocks(model))
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["rwkv", "inkling_text", "bloom", "zaya"])  # token shift, convolution, residuals
def test_a_feed_forward_that_crosses_positions_or_takes_a_second_tensor_is_known(family):
    model = tiny(family)
    before = state_of(model)
    assert not all(position_by_position(model, each, some_ids()) for each in last_blocks(model))
    assert state_of(model) == before


def test_a_feed_forward_below_an_attention_does_not_work_position_by_position():
    model = tiny("llama")
    assert not position_by_position(model, model.model.layers[0].mlp, some_ids())
    assert not position_by_position(model, model.model.layers[-1].self_attn, some_ids())
    assert not position_by_position(model, model.model.layers[-1].mlp, some_ids()[:, :1])  # nothing to compare with


def test_hooks_are_gone_after_a_trial_that_failed():
    model = tiny("llama")
    model.lm_head.register_forward_pre_hook(lambda *args: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        position_by_position(model, model.model.layers[-1].mlp, some_ids())
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_the_recorder_narrows_the_last_feed_forward_only(family):
    model, seen, batch = build(family), [], collate(make_samples(5))
    with Recorder(model, CONFIG) as record:
        record(batch)  # tries what can be left out
        for block in {each.block: None for each in find_up_projections(model, 2)}:
            inside = next(block.children())
            inside.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
        record(batch)
    learnt = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert seen[:2] == [batch["input_ids"][:, 1:].numel(), learnt]  # experts run again, sample by sample


# ---- what rows have in common


def prefixed(count: int = 4, first: int = 20, shortest: int = 4, longest: int = 10, seed: int = 0) -> list[Sample]:
    """Samples that share a prefix without learnt tokens; the tokens after it differ."""
    common, unlearnt = torch.arange(first, first + PREFIX), torch.full((PREFIX,), IGNORE)
    samples = make_samples(count, VOCAB, shortest, longest, seed)
    for number, sample in enumerate(samples):
        sample["input_ids"][0] = 100 + number
        sample["input_ids"] = torch.cat([common, sample["input_ids"]])
        sample["labels"] = torch.cat([unlearnt, sample["labels"]])
    return samples


class Watched:
    """A recorder, how many tokens the feed-forward of the lowest layer runs on, and how many tokens rows share."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.seen = 0
        lowest = find_up_projections(record.model, len(decoder_layers(record.model)[1]))[0]
        lowest.module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        self.seen += args[0].shape[:-1].numel()

    def tokens(self, samples: list[Sample], side: str = "right", shared: int | None = None) -> int:
        """The tokens of a batch that the lowest layer runs on."""
        self.seen = 0
        self.record(collate(samples, side), shared)
        return self.seen

    @property
    def sharing(self) -> bool | None:
        return self.record._forward._sharing


@contextlib.contextmanager
def watched(model: nn.Module, config: ResonanceConfig = CONFIG) -> Iterator[Watched]:
    """With a recorder that has tried its model already, on a batch without a shared prefix."""
    with Recorder(model, config) as record:
        record(collate(make_samples(2, seed=9)))
        yield Watched(record)


def width(samples: list[Sample]) -> int:
    """The columns of a batch, without the last."""
    return max(len(sample["input_ids"]) for sample in samples) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_begin_alike_score_as_each_alone(family):
    samples = prefixed(3)
    with Recorder(build(family), CONFIG) as record:
        alone = [record(collate([sample])) for sample in samples]  # which have nothing in common with anything yet
        found = record(collate(samples, "left" if family == "cpmant" else "right"))
        sharing = record._forward._sharing
    truth = Resonance(*(np.concatenate([getattr(each, name) for each in alone]) for name in FIELDS))
    assert error_over_spread(found, truth) < 1e-6
    np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-12)
    assert bool(sharing) == (family not in NOT_SHARED)


@pytest.mark.parametrize("family", PROMISED)
def test_the_lowest_layer_sees_what_rows_have_in_common_once(family):
    model, first, other = build(family), prefixed(longest=10, shortest=10), prefixed(longest=10, shortest=10, first=40)
    second = prefixed(5, longest=10, shortest=10, seed=1)
    with watched(model) as watch:
        watch.tokens(first)  # tries whether it comes to the same
        assert watch.sharing is True
        assert watch.tokens(other) == PREFIX + 4 * (width(other) - PREFIX)
        assert watch.tokens(first) == PREFIX + 4 * (width(first) - PREFIX)
        assert watch.tokens(second) == 5 * (width(second) - PREFIX)  # known from the batch before
        assert watch.tokens(second[:1]) == width(second[:1])
        assert watch.tokens(second[:1], shared=PREFIX) == width(second[:1]) - PREFIX
        assert watch.tokens(make_samples(1, seed=9)) == width(make_samples(1, seed=9))


@pytest.mark.parametrize("family", PROMISED)
def test_a_row_alone_behind_a_prefix_that_is_known_scores_as_it_does_without(family):
    model, samples = build(family), prefixed()
    truth = record_all(model, samples, CONFIG, size=1)
    with watched(model) as watch:
        watch.tokens(samples)
        found = [watch.record(collate([sample]), shared=PREFIX) for sample in samples]
    score = np.concatenate([each.score for each in found])
    assert np.abs(score - truth.score).max() < 1e-6 * np.ptp(truth.score)


@pytest.mark.parametrize("family", PROMISED)
@pytest.mark.parametrize("shared", [None, PREFIX])
def test_what_comes_of_a_batch_does_not_depend_on_those_before_it(family, shared):
    model, samples, others = build(family), prefixed(), prefixed(3, first=40)
    found = []
    for before in ([], [others], [samples[:1], others], [samples]):
        with Recorder(model, CONFIG) as record:
            record.try_sharing(collate(samples[:1]))
            for batch in before:
                record(collate(batch))
            found.append(record(collate(samples), shared).layers.tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_one_row_tells_whether_rows_may_share(family):
    with Recorder(build(family), CONFIG) as record:
        record.try_sharing(collate(prefixed()[:1]))
        assert record._forward._sharing is (family == "llama")


@pytest.mark.parametrize("family", ["xlstm", "recurrent_gemma", "rwkv", "jamba"])
def test_sharing_is_given_up_for_a_model_without_such_a_cache(family):
    model, samples = build(family), prefixed()
    truth = record_all(model, samples, CONFIG, size=1)
    with Recorder(model, CONFIG) as record:
        for _ in range(2):
            assert error_over_spread(record(collate(samples)), truth) < 1e-6
            assert record._forward._sharing is False


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4}),
        ("gpt_oss", {"sliding_window": 4}),
        ("llama4_text", {"attention_chunk_size": 8}),
    ],
)
def test_a_window_shorter_than_what_rows_share_changes_nothing(family, overrides):
    model, samples = build(family, **overrides), prefixed(shortest=12, longest=20)
    with Recorder(model, CONFIG) as record:
        found = record(collate(samples))
        assert record._forward._sharing is True
    assert error_over_spread(found, record_all(model, samples, CONFIG, size=1)) < 1e-6


LONG_ROPES = {
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}
    | {"max_position_embeddings": 2 * PREFIX},
    "phi3": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
        | {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
        | {"original_max_position_embeddings": 2 * PREFIX},
        "original_max_position_embeddings": 2 * PREFIX,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("family", LONG_ROPES)
def test_positions_that_depend_on_the_length_of_a_row_are_those_of_each_alone(family):
    model = build(family, **LONG_ROPES[family])
    short, long = prefixed(), prefixed(3, shortest=24, longest=24)  # on this side of the limit, and beyond
    with Recorder(model, CONFIG) as record:
        for samples in (short, long, short):
            found = record(collate(samples))
            assert error_over_spread(found, record_all(model, samples, CONFIG, size=1)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_padding_on_the_left_or_a_batch_of_one_is_not_shared(family):
    model, samples = build(family), prefixed()
    with watched(model) as watch:
        assert watch.tokens(samples, "left") == 4 * width(samples)
        for sample in samples:
            assert watch.tokens([sample]) == width([sample])
        assert watch.sharing is None
        assert watch.record._forward._prefix._known is None


def test_too_little_in_common_is_not_shared():
    samples = make_samples(4, VOCAB, 40, 40)
    for sample in samples:
        sample["input_ids"][:4] = torch.arange(4) + 50
    with watched(build("llama")) as watch:
        assert watch.tokens(samples) == 4 * width(samples)
        assert watch.sharing is None


def test_nothing_is_below_the_lowest_measured_layer_if_all_are_measured():
    config, model, samples = ResonanceConfig(n_layers=3), build("llama"), prefixed()
    with watched(model, config) as watch:
        assert watch.tokens(samples) == 4 * width(samples)
        assert watch.sharing is None


@pytest.mark.parametrize("again", [False, True], ids=["as the first batch", "later"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_rows_score_alike(family, again):
    model, rows = build(family), prefixed(1) * 3
    with Recorder(model, CONFIG) as record:
        if again:
            record(collate(prefixed()))
        found = record(collate(rows))
        assert record._forward._sharing is True
        after = record(collate(prefixed()))
    np.testing.assert_allclose(found.score, record_all(model, rows, CONFIG, size=1).score, rtol=1e-9)
    np.testing.assert_allclose(after.score, record_all(model, prefixed(), CONFIG, size=1).score, rtol=1e-9)


@pytest.mark.parametrize("again", [False, True], ids=["as the first batch", "later"])
def test_rows_that_differ_in_their_last_token_alone(again):
    model, sample = build("llama"), prefixed(1)[0]
    rows = []
    for last in (5, 6, 7):
        changed = {name: tensor.clone() for name, tensor in sample.items()}
        changed["input_ids"][-1] = changed["labels"][-1] = last
        rows.append(changed)
    with Recorder(model, CONFIG) as record:
        if again:
            record(collate(prefixed()))
        found = record(collate(rows))
    assert error_over_spread(found, record_all(model, rows, CONFIG, size=1)) < 1e-6


def test_a_row_may_be_what_is_shared_and_one_token():
    model, samples = build("llama"), prefixed()
    short = {name: tensor[: PREFIX + 1].clone() for name, tensor in samples[0].items()}
    short["labels"][-1] = short["input_ids"][-1]
    rows = [short, *samples[1:]]
    with Recorder(model, CONFIG) as record:
        found = record(collate(rows))
        assert record._forward._sharing is True
    assert error_over_spread(found, record_all(model, rows, CONFIG, size=1)) < 1e-6


def test_a_row_that_is_shorter_than_what_the_others_share():
    model, samples = build("llama"), prefixed()
    rows = [{name: tensor[:5].clone() for name, tensor in samples[0].items()}, *samples[1:]]
    rows[0]["labels"] = rows[0]["input_ids"]
    with Recorder(model, CONFIG) as record:
        record(collate(samples))
        assert record._forward._sharing is True
        found = record(collate(rows))
    assert error_over_spread(found, record_all(model, rows, CONFIG, size=1)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_what_is_shared_may_reach_into_what_is_learnt(family):
    model, samples = build(family), prefixed()
    for number, sample in enumerate(samples):
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][: 3 * number] = IGNORE
    with Recorder(model, CONFIG) as record:
        found = record(collate(samples))
        assert record._forward._sharing is True
    truth = record_all(model, samples, CONFIG, size=1)
    assert error_over_spread(found, truth) < 1e-6
    np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-12)


@pytest.mark.parametrize("family", ["openai-gpt", "recurrent_gemma"])
def test_what_is_learnt_within_the_prefix_alone_says_nothing_about_the_rest(family):
    model, first, samples = build(family), prefixed(3), prefixed(3, seed=1)
    for sample in first:
        sample["labels"][:] = IGNORE
        sample["labels"][5:PREFIX] = sample["input_ids"][5:PREFIX]
    with Recorder(model, CONFIG) as record:
        record(collate(first))
        found = record(collate(samples))
    assert error_over_spread(found, record_all(model, samples, CONFIG, size=1)) < 1e-6


@pytest.mark.parametrize("again", [False, True], ids=["as the first batch", "later"])
@pytest.mark.parametrize("common", [False, True], ids=["nothing in common", "a prefix"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_a_batch_without_a_learnt_token_has_no_loss_and_is_not_changed(family, common, again):
    model = build(family)
    samples = prefixed() if common else make_samples(4)
    for sample in samples:
        sample["labels"][:] = IGNORE
    with Recorder(model, CONFIG) as record:
        if again:
            record(collate(prefixed()))
        found = record(collate(samples))
        after = record(collate(prefixed()))
    assert (found.loss == 0).all()
    assert (found.num_tokens == 0).all()
    assert (found.score == found.score[0]).all()  # what weight decay alone does
    np.testing.assert_allclose(after.score, record_all(model, prefixed(), CONFIG, size=1).score, rtol=1e-9)


def test_a_batch_whose_tensors_are_used_again_for_the_next_is_not_taken_for_the_same():
    model, samples = build("llama"), prefixed(shortest=8, longest=8)
    batch, others = collate(samples), prefixed(first=40, shortest=8, longest=8)
    with Recorder(model, CONFIG) as record:
        record(batch)
        assert record._forward._sharing is True
        for name, tensor in collate(others).items():
            batch[name].copy_(tensor)
        found = record(batch)
    assert error_over_spread(found, record_all(model, others, CONFIG, size=1)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_shared_is_forgotten_outside_as_the_weights_may_change(family):
    model, batch = build(family), collate(prefixed())
    record = Recorder(model, CONFIG)
    with record:
        before = record(batch)
        assert record._forward._sharing is True
    assert record._forward._prefix._known is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    with record:
        found = record(batch)
    with Recorder(model, CONFIG) as fresh:
        truth = fresh(batch)
    assert error_over_spread(found, truth) < 1e-6
    assert error_over_spread(before, truth) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_nothing_is_left_on_the_model(family):
    model, batch = build(family).train(), collate(prefixed())
    lowest, highest = decoder_layers(model)[1][0], decoder_layers(model)[1][-1]
    own = lowest.forward
    lowest.forward = lambda *args, **kwargs: own(*args, **kwargs)  # the user's
    broken: set[nn.Module] = set()

    def fail(module: nn.Module, *args: object) -> None:
        if module in broken:
            raise RuntimeError("no")

    for layer in (lowest, highest):
        list(layer.children())[-1].register_forward_hook(fail)
    before, forward = state_of(model), lowest.forward
    with Recorder(model, CONFIG) as record:
        record(batch)
        assert record._forward._sharing is True
    assert state_of(model) == before
    for layer in (lowest, highest):
        with Recorder(model, CONFIG) as record:
            inside = state_of(model)
            record(batch)
            assert state_of(model) == inside
            record._forward.forget()
            broken.add(list(layer.children())[-1])
            with pytest.raises(RuntimeError, match="no"):
                record(batch)
            assert state_of(model) == inside
            broken.clear()
            record(batch)
        assert state_of(model) == before
    assert lowest.forward is forward


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_deterministic_algorithms_suffice(family):
    model, samples = build(family), prefixed()
    torch.use_deterministic_algorithms(True)
    try:
        with Recorder(model, CONFIG) as record:
            one, two = record(collate(samples)), record(collate(samples))
            assert record._forward._sharing is True
            record(collate(make_samples(3), "left"))
    finally:
        torch.use_deterministic_algorithms(False)
    np.testing.assert_allclose(one.layers, two.layers, rtol=1e-12)


# ---- weights in bfloat16


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_weights_that_are_cast_once_give_what_autocast_gives(overrides):
    model, ids = tiny("llama", **overrides), some_ids()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            truth = model(input_ids=ids, use_cache=False).logits
        with bfloat16_forward(model, True):
            found = model(input_ids=ids, use_cache=False).logits
        own = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, truth)
    assert found.dtype == truth.dtype
    assert not torch.equal(found.float(), own)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "opt", "qwen3", "jamba", "granite", "bloom"])
def test_autocast_gives_the_same_losses_of_any_model(family):
    model, batch = tiny(family), collate(make_samples(3, VOCAB))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            truth = token_losses(model, batch)
        with bfloat16_forward(model, True):
            assert torch.equal(token_losses(model, batch), truth)


def places(model: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    return [(id(each), each.data_ptr(), each.dtype) for each in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_are_the_very_same_afterwards(tied, fails):
    model = tiny("llama", tie_word_embeddings=tied)
    aside = [model.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight]
    before = places(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = [*aside, model.model.embed_tokens.weight, model.model.norm.weight]
    pointers = [each.data_ptr() for each in untouched]
    with contextlib.suppress(ZeroDivisionError), bfloat16_forward(model, True, aside):
        assert [each.data_ptr() for each in untouched] == pointers
        assert all(each.dtype == torch.float32 for each in untouched)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert torch.is_autocast_enabled("cpu")
        if fails:
            _ = 1 / 0
    assert not torch.is_autocast_enabled("cpu")
    assert places(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_without_bfloat16_nothing_happens():
    model = tiny("llama")
    before = places(model)
    with bfloat16_forward(model, False):
        assert places(model) == before
        assert not torch.is_autocast_enabled("cpu")
    assert places(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_are_not_float32_are_not_cast(dtype):
    model = tiny("llama").to(dtype)
    before = places(model)
    with bfloat16_forward(model, True):
        assert places(model) == before
    assert places(model) == before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_scores_in_bfloat16_are_those_of_a_plain_autocast(family):
    model, samples, config = tiny(family), prefixed(6), ResonanceConfig(n_layers=2, eps=1e-4)
    measured = [each.parameter for each in find_up_projections(model, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truth = record_all(model, samples, config)
    with bfloat16_forward(model, True, measured):
        found = record_all(model, samples, config)
    np.testing.assert_array_equal(found.layers, truth.layers)


def offloaded(layers: set[int], folder: Path) -> nn.Module:
    """A model with some layers and the head on disk except while they run."""
    places = {f"model.layers.{i}": "disk" if i in layers else "cpu" for i in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(build("llama"), places, main_device="cpu", offload_dir=folder)


def test_a_model_that_lies_on_disk_in_part_scores_alike(tmp_path):
    truth, model = record_all(build("llama"), make_samples(), CONFIG), offloaded({0}, tmp_path)
    assert model.lm_head.weight.device.type == "meta"
    assert error_over_spread(record_all(model, make_samples(), CONFIG), truth) < 1e-6


def test_weights_that_are_measured_have_to_be_at_hand(tmp_path):
    with pytest.raises(InputError, match=r"layers\.2.* is offloaded.* Place the last 2 layers on a device"):
        Recorder(offloaded({2}, tmp_path), CONFIG)

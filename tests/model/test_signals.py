"""Each signal against its plain formula in float64, from all logits at once; and the numbers that must not change."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.samples import Sample, collate, make_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resofilter_trainer import InputError, Recorder, Resonance, ResonanceConfig, literal
from resofilter_trainer.model import head
from resofilter_trainer.model.head import linear_losses, losses_in_pieces
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.signals import SIGNALS, Tokens, chosen_signals
from resofilter_trainer.model.token_statistics import TokenStatistics

ALL = ("entropy", "error", "rank", "top_entropy")
FORMS = {
    "resonance": {},
    "resonance_sgd": {"update": "sgd", "norm": "mean_abs"},
    "resonance_l2": {"update": "sgd", "norm": "l2"},
}
# Families whose logits are one linear map, with a bias, capped or scaled; experts; weights the other way round.
HEADS = ["llama", "phi", "gemma2", "cohere", "mixtral", "gpt2"]
RECORDED = [name for name, signal in SIGNALS.items() if not signal.of_layers]


def plain_tokens(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss, entropy, error, rank and the entropy of the top 20 of each token, by the book in float64."""
    p = logits.double().softmax(-1)
    top = p.sort(1, descending=True).values[:, :20]
    top /= top.sum(1, keepdim=True)
    own = p.gather(1, targets[:, None])
    error = p - nn.functional.one_hot(targets, p.shape[1])
    return {
        "losses": -own[:, 0].log(),
        "entropy": -torch.where(p > 0, p * p.log(), 0).sum(1),
        "error": error.square().sum(1).sqrt(),
        "rank": 1 + (logits > logits.gather(1, targets[:, None])).sum(1).double(),
        "top_entropy": -torch.where(top > 0, top * top.log(), 0).sum(1),
    }


@contextlib.contextmanager
def untied_head(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weight of the head as a parameter of its own."""
    module = model.get_output_embeddings()
    tied = module.weight
    module.weight = nn.Parameter(tied.detach().clone())
    yield module.weight
    module.weight = tied


def plain_head_gradient(model: nn.Module, sample: Sample) -> float:
    """The norm of the gradient of the mean loss with respect to the head's weight, by autograd."""
    learnt = sample["labels"][1:] != -100
    with own_precision(model), untied_head(model) as weight:
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits[learnt], sample["labels"][1:][learnt])
        return float(torch.autograd.grad(loss, weight)[0].norm())


def plain_chain(model: nn.Module, sample: Sample) -> float:
    """CoE-C of all hidden states that the model returns, layer after layer."""
    learnt = sample["labels"][1:] != -100
    with torch.no_grad(), own_precision(model):
        found = model(input_ids=sample["input_ids"][None], use_cache=False, output_hidden_states=True).hidden_states
    states = [each[0, :-1][learnt].double().mean(0) for each in found]

    def angle(a: Tensor, b: Tensor) -> float:
        return math.acos(float(a @ b / a.norm() / b.norm()))

    whole, turn = float((states[-1] - states[0]).norm()), angle(states[0], states[-1])
    steps = [float((b - a).norm()) / whole for a, b in itertools.pairwise(states)]
    turns = [angle(a, b) / turn for a, b in itertools.pairwise(states)]
    real = sum(step * math.cos(each) for step, each in zip(steps, turns, strict=True)) / len(steps)
    imaginary = sum(step * math.sin(each) for step, each in zip(steps, turns, strict=True)) / len(steps)
    return math.hypot(real, imaginary)


def plain_signals(model: nn.Module, sample: Sample) -> dict[str, float]:
    """Every signal that has a formula of tokens, of one sample alone."""
    with torch.no_grad(), own_precision(model):
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1].double()
    learnt = sample["labels"][1:] != -100
    found = plain_tokens(logits[learnt], sample["labels"][1:][learnt])
    loss, entropy, error, rank = (found[name].tolist() for name in ("losses", "entropy", "error", "rank"))
    count, vocabulary = len(loss), logits.shape[1]
    return {
        "loss": sum(loss) / count,
        "loss_sum": sum(loss),
        "loss_median": (sorted(loss)[(count - 1) // 2] + sorted(loss)[count // 2]) / 2,
        "loss_max": max(loss),
        "loss_top": np.mean(sorted(loss, reverse=True)[: max(count // 10, 1)]),
        "entropy": sum(entropy) / count,
        "conflict": sum(a * (1 - b / math.log(vocabulary)) for a, b in zip(loss, entropy, strict=True)) / count,
        "surprise": sum(a - b for a, b in zip(loss, entropy, strict=True)) / count,
        "rank": sum(rank) / count,
        "rsr": sum(min(each, 100) for each in rank) / sum(loss),
        "el2n": sum(error) / count,
        "grand_head": plain_head_gradient(model, sample),
        "embedding_chain": plain_chain(model, sample),
    }


def double(family: str) -> nn.Module:
    """A model whose distributions are far from even, as those of a trained one are."""
    torch.manual_seed(0)
    model = tiny(family, experts_implementation="eager").double()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def measured(model: nn.Module, samples: list[Sample], size: int, side: str = "right", config=None) -> dict:
    with Recorder(model, config or ResonanceConfig(), "all") as record:
        found = [record(collate(samples[i : i + size], side)) for i in range(0, len(samples), size)]
    return {name: np.concatenate([each.signals[name] for each in found]) for name in found[0].signals}


@pytest.fixture
def narrow_tiles(monkeypatch) -> None:
    """Tiles of a few tokens of the vocabulary, and few positions at a time."""
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", 700)
    monkeypatch.setattr(head, "PIECE_LOGITS", 700)


# ---- of tokens


@given(
    st.integers(1, 7), st.integers(2, 40), st.integers(1, 50), st.booleans(), st.integers(0, 1000), st.floats(0.01, 30)
)
@settings(max_examples=150, deadline=None)
def test_tiles_and_pieces_give_what_all_logits_give(rows, vocabulary, width, bias, seed, scale):
    torch.manual_seed(seed)
    linear = nn.Linear(6, vocabulary, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=scale)
    hidden, targets = torch.randn(rows, 6, dtype=torch.float64), torch.randint(vocabulary, (rows,))
    weights = torch.rand(rows, dtype=torch.float64)
    smallest, head.SMALLEST_TILE = head.SMALLEST_TILE, 1
    try:
        tiles, pieces, capped = (TokenStatistics(ALL) for _ in range(3))
        found = linear_losses(hidden, linear, targets, weights, width * rows, tiles)
        without = linear_losses(hidden, linear, targets, weights, width * rows)
    finally:
        head.SMALLEST_TILE = smallest
    assert all(torch.equal(one, other) for one, other in zip(found, without, strict=True))
    losses_in_pieces(hidden, linear, targets, weights, width, pieces)
    cap = nn.Sequential(linear, nn.Tanh())
    losses_in_pieces(hidden, cap, targets, weights, width, capped)
    for truth, some in ((linear, (tiles, pieces)), (cap, (capped,))):
        for name, values in plain_tokens(truth(hidden), targets).items():
            for each in some:
                if name == "losses":
                    torch.testing.assert_close(each.of(name)[values < 30], values[values < 30], rtol=1e-9, atol=1e-12)
                else:
                    torch.testing.assert_close(each.of(name), values, rtol=1e-9, atol=1e-12)


def certain(margin: float, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, nn.Linear]:
    """A distribution that has its target, token 1, by so many nats before every other token."""
    linear = nn.Linear(1, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.fill_(-margin)
        linear.weight[1] = 0
    return torch.ones(1, 1, dtype=dtype), linear


@pytest.mark.parametrize("width", [1, 3, 100])
@pytest.mark.parametrize("margin", [1.0, 10.0, 20.0, 40.0, 80.0])
def test_an_all_but_certain_token_has_all_its_digits(margin, width, narrow_tiles):
    """1 - p is below float32's spacing near 1 from a margin of 17 on; e^-2m underflows at 52."""
    hidden, linear = certain(margin, 12, torch.float32)
    r, targets = 11 * math.exp(-margin), torch.tensor([1])
    truth = {
        "losses": math.log1p(r),
        "entropy": math.log1p(r) + margin * r / (1 + r),
        "error": r * math.sqrt(1 + 1 / 11) / (1 + r),
        "rank": 1.0,
        "top_entropy": math.log1p(r) + margin * r / (1 + r),  # of a vocabulary of 12
    }
    for statistics in (tiles := TokenStatistics(ALL), pieces := TokenStatistics(ALL)):
        if statistics is tiles:
            linear_losses(hidden, linear, targets, None, width, statistics)
        else:
            losses_in_pieces(hidden, linear, targets, None, 1, pieces)
        for name, value in truth.items():
            assert statistics.of(name).item() == pytest.approx(value, rel=1e-5 if name != "losses" else 1e-6), name


@pytest.mark.parametrize("width", [1, 5, 8, 64])
def test_equally_probable_tokens_do_not_come_before_the_learnt_one(width, narrow_tiles):
    """Repeated rows of the head, whose logits only the rounding of different tiles tells apart; in each precision."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        base = torch.randn(8, 96)
        linear = nn.Linear(96, 64, bias=False)
        linear.weight.data = base.repeat(8, 1)  # token 0 is token 8 is token 16 ...
        linear, hidden = linear.to(dtype), torch.randn(30, 96).to(dtype)
        targets, statistics = torch.arange(30) * 2 % 64, TokenStatistics(["rank"])
        linear_losses(hidden, linear, targets, None, width * 30, statistics)
        own = (hidden.double() @ linear.weight.detach().double().T).round(decimals=6)
        if dtype == torch.bfloat16:
            own = own.bfloat16()
        truth = plain_tokens(own, targets)["rank"]
        assert statistics.of("rank").tolist() == truth.tolist()


def test_a_head_whose_logits_are_all_equal_ranks_every_token_first():
    statistics = TokenStatistics(ALL)
    losses_in_pieces(torch.ones(3, 4), lambda own: own * 0, torch.tensor([0, 1, 3]), None, 2, statistics)
    assert statistics.of("rank").tolist() == [1, 1, 1]
    assert statistics.of("entropy").tolist() == pytest.approx([math.log(4)] * 3)


def test_tokens_that_a_model_masks_out_have_no_part_in_it():
    """Some models set the logits of unused tokens to minus infinity."""
    logits, statistics = torch.randn(4, 6), TokenStatistics(ALL)
    masked = torch.cat([logits, torch.full((4, 3), -torch.inf)], dim=1)
    statistics.add_logits(masked, torch.tensor([0, 1, 2, 3]))
    for name, values in plain_tokens(logits, torch.tensor([0, 1, 2, 3])).items():
        torch.testing.assert_close(statistics.of(name).double(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [4, 10])
def test_tokens_that_a_bias_masks_out_have_no_part_in_it(width, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden, targets = nn.Linear(6, 10), torch.randn(8, 6), torch.arange(8) % 5
    linear.bias.data[[6, 7, 8, 9]] = -torch.inf
    statistics = TokenStatistics(ALL)
    losses, _ = linear_losses(hidden, linear, targets, torch.ones(8), width * 8, statistics)
    truth = plain_tokens(linear(hidden).detach()[:, :6], targets)
    torch.testing.assert_close(statistics.of("losses"), losses)
    for name in ALL:
        torch.testing.assert_close(statistics.of(name).double(), truth[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("width", [3, 10])
def test_huge_logits_do_not_overflow(width, sign, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden = nn.Linear(6, 10), sign * torch.randn(8, 6) * 1e4
    statistics, targets = TokenStatistics(ALL), torch.arange(8)
    linear_losses(hidden, linear, targets, None, width * 8, statistics)
    truth = plain_tokens(linear(hidden).detach(), targets)
    for name in ALL:
        torch.testing.assert_close(statistics.of(name).double(), truth[name], rtol=1e-3, atol=1e-3)


def test_only_what_is_asked_for_is_collected():
    hidden, linear = certain(1.0, 5, torch.float32)
    statistics = TokenStatistics(["rank"])
    linear_losses(hidden, linear, torch.tensor([1]), None, 5, statistics)
    assert [len(statistics.of(name)) for name in ("losses", *ALL)] == [1, 0, 0, 1, 0]
    assert len(TokenStatistics(ALL).of("rank")) == 0


def test_a_bfloat16_forward_brings_its_rounding_and_no_more(narrow_tiles):
    torch.manual_seed(0)
    linear, hidden, targets = nn.Linear(32, 200), torch.randn(50, 32), torch.randint(200, (50,))
    statistics = TokenStatistics(ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_losses(hidden, linear, targets, torch.ones(50), 50 * 30, statistics)
    truth = plain_tokens(linear(hidden).detach(), targets)
    for name, tolerance in (("entropy", 0.01), ("error", 0.01), ("rank", 0.03)):
        found = statistics.of(name).double()
        assert (found - truth[name]).norm() < tolerance * truth[name].norm()


# ---- of rows


@pytest.mark.parametrize("family", HEADS)
def test_every_signal_is_its_plain_formula_in_every_batch(family, narrow_tiles):
    model, samples = double(family), make_samples(7, longest=40)
    truth = [plain_signals(model, sample) for sample in samples]
    assert {*truth[0], *FORMS} == {*RECORDED}
    for size in (1, 3, 7):
        for side in ("right", "left"):
            found = measured(model, samples, size, side)
            for name in truth[0]:
                np.testing.assert_allclose(found[name], [each[name] for each in truth], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("own", [{}, {"eps": 1e-4, "norm": "l2"}, {"update": "sgd"}, {"update": "sgd", "norm": "l2"}])
def test_the_forms_of_resonance_are_those_of_recorders_of_their_own(family, own):
    """And of the literal procedure, which the recorder's tests compare all settings with."""
    model, samples, config = double(family), make_samples(4), ResonanceConfig(n_layers=2, **own)
    found = measured(model, samples, 3, config=config)
    for name, form in FORMS.items():
        settings = {"update": config.update, "norm": config.norm, **form}
        alone = ResonanceConfig(n_layers=2, eps=config.eps, **settings)
        with Recorder(model, alone) as record:
            truth = np.concatenate([record(collate([each])).score for each in samples])
        np.testing.assert_allclose(found[name], truth, rtol=1e-9)
        if own == {} and name != "resonance" and family == "llama":
            np.testing.assert_allclose(literal(model, samples, alone).score, truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("own", [{}, {"update": "sgd", "norm": "l2"}])
def test_resonance_and_loss_are_the_same_to_the_last_bit(family, own, dtype):
    model, batch = tiny(family).to(dtype), collate(make_samples(5, longest=60))
    config = ResonanceConfig(**own)
    with Recorder(model, config) as record:
        without = record(batch)
    with Recorder(model, config, "all") as record:
        found = record(batch)
    assert without.signals == {}
    assert [*found.signals] == RECORDED
    for name in ("loss", "num_tokens", "layers"):
        assert np.array_equal(getattr(found, name), getattr(without, name))
    assert np.array_equal(found.signals["resonance"], without.score)
    assert np.array_equal(found.signals["loss"], without.loss)
    assert all(each.dtype == np.float64 and np.isfinite(each).all() for each in found.signals.values())


def test_a_layer_without_a_gradient_moves_in_no_form():
    model, sample = double("llama"), make_samples(1)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    found = measured(model, sample, 1, config=ResonanceConfig(n_layers=1, weight_decay=0.0))
    assert found["resonance_sgd"].tolist() == found["resonance_l2"].tolist() == [0.0]


def test_packed_samples_have_the_signals_of_padded_ones():
    model, samples = double("llama"), make_samples(4)
    packed = {
        "input_ids": torch.cat([each["input_ids"] for each in samples])[None],
        "labels": torch.cat([each["labels"] for each in samples])[None],
        "position_ids": torch.cat([torch.arange(len(each["input_ids"])) for each in samples])[None],
    }
    with Recorder(model, ResonanceConfig(), "all") as record:
        found = record(packed).signals
    for name, values in measured(model, samples, 4).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)


def test_a_sample_without_a_learnt_token_spoils_nothing():
    model, samples = double("llama"), make_samples(3)
    alone = measured(model, samples, 3)
    nothing = {"input_ids": samples[0]["input_ids"], "labels": torch.full_like(samples[0]["labels"], -100)}
    found = measured(model, [samples[0], nothing, *samples[1:]], 4)
    for name, values in found.items():
        np.testing.assert_allclose(values[[0, 2, 3]], alone[name], rtol=1e-12)
        assert values[1] == (math.inf if name == "rsr" else pytest.approx(0, abs=1e-4)), name
    assert np.isfinite(measured(model, [nothing], 1)["entropy"]).all()


def test_no_more_is_measured_than_asked():
    model, batch = double("llama"), collate(make_samples(3))
    with Recorder(model, ResonanceConfig(), "loss_max") as record:
        assert record.signals == ("loss_max",)
        assert record._measures.statistics([]).wanted == frozenset()
        assert record._measures.forms == (ResonanceConfig(),)
        assert [*record(batch).signals] == ["loss_max"]
    with Recorder(model, ResonanceConfig(), ["resonance_l2", "loss"]) as record:
        assert record._measures.statistics([]) is None
    assert Resonance(np.ones(1), np.ones(1), np.ones((1, 1))).signals == {}


# ---- of small arrays


def tokens_of(rows: list[list[float]]) -> Tokens:
    losses, empty = np.concatenate([np.array(row, dtype=float) for row in rows]), np.empty(0)
    counts, ranks = np.array([len(row) for row in rows]), np.arange(len(losses)) * 60.0 + 1
    return Tokens(counts, 50, empty, losses, empty, empty, ranks, empty)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("loss_sum", [6, 0, 210]),
        ("loss_median", [2, 0, 10.5]),
        ("loss_max", [3, 0, 20]),
        ("loss_top", [3, 0, 19.5]),  # of 3 tokens one, of 20 two
        ("rsr", [(1 + 61 + 100) / 6, math.inf, 20 * 100 / 210]),
    ],
)
def test_numbers_of_rows(name, truth):
    tokens = tokens_of([[1, 3, 2], [], list(range(1, 21))])
    np.testing.assert_allclose(SIGNALS[name].of_tokens(tokens), truth)


def test_tokens_that_surprise_nobody_have_an_infinite_ratio():
    assert SIGNALS["rsr"].of_tokens(tokens_of([[0.0, 0.0]])).tolist() == [math.inf]


# ---- names


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, ()),
        ([], ()),
        ("all", tuple(SIGNALS)),
        (["rank", "all"], tuple(SIGNALS)),
        ("entropy", ("entropy",)),
        ("rank, entropy", ("entropy", "rank")),
        (["rank", "entropy", "rank"], ("entropy", "rank")),
        (("loss",), ("loss",)),
        (iter(["rsr"]), ("rsr",)),
    ],
)
def test_names_are_given_in_any_way(asked, found):
    assert chosen_signals(asked) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("entrpy", "signals must be one of 'resonance', .*, 'all', got 'entrpy'. Did you mean 'entropy'"),
        (["loss", "el2"], "got 'el2'. Did you mean 'el2n'"),
        ("", "got ''"),
        ([None], "got None"),
        ([["loss"]], r"got \['loss'\]"),
        (3, "signals must be names of signals, or 'all', got 3"),
        (True, "signals must be names of signals, or 'all', got True"),
    ],
)
def test_an_unknown_signal_is_named_with_the_nearest(asked, message):
    with pytest.raises(InputError, match=message) as error:
        Recorder(tiny("llama"), ResonanceConfig(), asked)
    assert "\n" not in str(error.value)


def test_every_signal_says_what_it_is():
    for name, signal in SIGNALS.items():
        assert {*signal.metadata} == {"direction", "unit", "formula", "source"}
        assert all(signal.metadata.values()), name
        assert (signal.of_tokens is None) == (name in ("loss", "layer_vote", *FORMS))
    assert [name for name, signal in SIGNALS.items() if signal.drop == "smallest"] == [
        "el2n",
        "grand_head",
        "embedding_chain",
    ]

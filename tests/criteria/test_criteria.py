"""Each criterion against the plain formula, sample by sample, on a tiny model; and the pass that measures rows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.samples import collate, make_samples
from helpers.scoring import COLUMNS, ROWS, arguments
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from resofilter_trainer import Criterion, DataSelector, InputError, ScoreTable, score_by, score_dataset
from resofilter_trainer.cli.entry import main
from resofilter_trainer.criteria.criterion import CRITERIA
from resofilter_trainer.criteria.model import (
    LR,
    below_one,
    farthest_first,
    grand,
    ifd,
    loss,
    norms,
)
from resofilter_trainer.criteria.text import without_prompt
from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.model.losses import IGNORE

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **settings)).double().eval()


def gemma(**settings):
    """With a cap on its logits, well within their reach."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.2, **settings)).double().eval()


MODELS = {"llama": llama, "gemma2": gemma}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


SAMPLES = make_samples(7, shortest=6)


@pytest.fixture
def samples():
    return SAMPLES


def learnt_logits(model, sample):
    """(n, V) and the n tokens that follow: of one sample, by itself."""
    logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1]
    learnt = sample["labels"][1:] != IGNORE
    return logits[learnt], sample["labels"][1:][learnt]


def nll(logits, targets):
    p = torch.softmax(logits, -1)
    return -sum(torch.log(p[i, target]) for i, target in enumerate(targets)).item() / len(targets)


def mean_entropy(logits, targets):
    return float(np.mean([torch.distributions.Categorical(logits=row).entropy().item() for row in logits]))


def mean_error(logits, targets):
    errors = torch.softmax(logits.detach(), -1)
    for i, target in enumerate(targets):
        errors[i, target] -= 1
    return float(np.mean([np.sqrt((error.numpy() ** 2).sum()) for error in errors]))


def step_of(model, sample):
    """The gradient of a sample's own loss, in `parameter.grad`."""
    model.zero_grad()
    F.cross_entropy(*learnt_logits(model, sample)).backward()


def gradient_norm(model, sample):
    step_of(model, sample)
    return np.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))


def norms_of_the_step(model, sample):
    step_of(model, sample)
    before = model.lm_head.weight.detach()
    after = before - LR * model.lm_head.weight.grad
    return [(after.norm() - before.norm()).item(), (after - before).norm().item()]


def response_loss(model, ids, start):
    """Mean loss of a response alone, from its `start`-th token on."""
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return F.cross_entropy(logits[start - 1 :], ids[start:]).item()


def ratio_of_losses(model, sample):
    first = max(int((sample["labels"] != IGNORE).nonzero()[0]), 1)
    response = sample["input_ids"][first:]
    given, _ = learnt_logits(model, sample)
    return F.cross_entropy(given[1:], response[1:]).item() / response_loss(model, response, 1)


def mean_hidden_state(model, sample):
    output = model(input_ids=sample["input_ids"][None], output_hidden_states=True)
    return output.hidden_states[-1][0].mean(0).tolist()


def response(sample):
    return [id_ for id_, label in zip(*(sample[name][1:].tolist() for name in sample), strict=True) if label != IGNORE]


def share_of_repeated_trigrams(model, sample):
    tokens = response(sample)
    grams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(len(grams), 1)


def cross_entropy_with_frequencies(model, sample):
    counts = Counter(token for each in SAMPLES for token in response(each))
    return np.mean([-math.log(counts[token] / sum(counts.values())) for token in response(sample)])


# Of every criterion the plain formula, one sample at a time: `(model, sample)` to a number, or to k numbers.
PLAIN = {
    "loss": lambda model, sample: nll(*learnt_logits(model, sample)),
    "perplexity": lambda model, sample: math.exp(nll(*learnt_logits(model, sample))),
    "entropy": lambda model, sample: mean_entropy(*learnt_logits(model, sample)),
    "el2n": lambda model, sample: mean_error(*learnt_logits(model, sample)),
    "grand": gradient_norm,
    "ifd": ratio_of_losses,
    "length": lambda model, sample: len(response(sample)),
    "response_ratio": lambda model, sample: len(response(sample)) / len(sample["input_ids"]),
    "repetition": share_of_repeated_trigrams,
    "rarity": cross_entropy_with_frequencies,
    "k_center": mean_hidden_state,
    "donod": norms_of_the_step,
}


def assert_agree(name, found, expected, rtol=1e-5):
    assert found.shape == np.shape(expected)
    found, expected = (torch.as_tensor(each).detach().reshape(len(found), -1) for each in (found, expected))
    if name == "donod":  # a difference of two norms of about 1: what is left of 16 digits
        np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-13)
        found, expected = found[:, 1:], expected[:, 1:]
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-7 if name == "k_center" else 1e-12)


def plain_of(name):
    if name not in PLAIN:
        pytest.fail(f"Criterion '{name}' has no plain formula to be tested against: add one to PLAIN.")
    return PLAIN[name]


def measure_of(name, samples):
    """`(model, batch)` to (B,) or (B, k), of a criterion."""
    criterion = CRITERIA[name]
    if not criterion.counts:
        return criterion.measure
    dataset = Dataset.from_list([{key: each.tolist() for key, each in sample.items()} for sample in samples])
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    return criterion.measure(PreparedRows(dataset, lengths, lengths, 0, "", {}, ""))


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_its_plain_formula(name, model):
    formula = plain_of(name)
    found = measure_of(name, SAMPLES)(model, collate(SAMPLES))
    expected = [formula(model, sample) for sample in SAMPLES]
    model.zero_grad()
    assert_agree(name, found, expected)


def test_no_plain_formula_is_of_nothing():
    assert set(PLAIN) <= set(CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_score_is_one_finite_number_and_names_what_it_is_made_of(name, model):
    criterion = CRITERIA[name]
    found = measure_of(name, SAMPLES)(model, collate(SAMPLES)).detach().double().numpy()
    assert np.isfinite(found).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    if criterion.join is not None:
        found = found.reshape(len(SAMPLES), -1)
        assert len(criterion.columns) in (0, found.shape[1])
        found = criterion.join(found)
    assert found.shape == (len(SAMPLES),)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_a_sample_is_measured_alike_in_any_company(name, model):
    measure = measure_of(name, SAMPLES)
    alone = torch.cat([measure(model, collate([sample])) for sample in SAMPLES]).detach()
    longer = {"input_ids": torch.full((40,), 5), "labels": torch.full((40,), 5)}
    together = measure(model, collate([*SAMPLES[::-1], longer]))[:-1].flip(0)
    assert_agree(name, together, alone, rtol=1e-6)


@pytest.mark.parametrize("name", CRITERIA)
def test_padding_does_not_count(name, model):
    measure, batch = measure_of(name, SAMPLES), collate(SAMPLES)
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    padded = {key: F.pad(batch[key], (0, 9), value=filler) for key, filler in fillers.items()}
    assert_agree(name, measure(model, padded), measure(model, batch).detach(), rtol=1e-6)


@pytest.mark.parametrize("name", [*CRITERIA, "resonance"])
def test_a_name_is_given_once(name):
    with pytest.raises(InputError, match=f"There is already a criterion '{name}'"):
        CRITERIA[name] = Criterion(loss)


def test_a_function_of_ones_own_has_its_own_name(tiny_llama, tokenizer):
    def entropy(model, batch):
        return batch["attention_mask"].sum(1)

    for mine in (entropy, Criterion(entropy)):
        with pytest.raises(InputError, match="There is already a criterion 'entropy'"):
            score_by(mine, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)


def test_a_function_of_the_package_may_be_passed_itself(tiny_llama, tokenizer):
    common = tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments()
    by_name, by_function = score_by("loss", *common, **COLUMNS), score_by(loss, *common, **COLUMNS)
    assert by_name.column("score").tolist() == by_function.column("score").tolist()


def test_k_center_takes_the_farthest_first():
    features = np.random.default_rng(0).normal(size=(12, 3))
    taken = [min(range(12), key=lambda row: np.linalg.norm(features[row] - features.mean(0)))]
    while len(taken) < 12:
        left = [row for row in range(12) if row not in taken]
        taken.append(max(left, key=lambda row: min(np.linalg.norm(features[row] - features[each]) for each in taken)))
    assert np.argsort(farthest_first(features)).tolist() == taken


def test_grand_needs_something_to_train(samples):
    frozen = llama().requires_grad_(False)
    with pytest.raises(InputError, match="all are frozen"):
        grand(frozen, collate(samples))


def test_donods_norms_with_a_bias_in_the_head(samples):
    model = llama()
    model.lm_head = torch.nn.Linear(32, 128, bias=True, dtype=torch.float64)
    expected = [norms_of_the_step(model, sample) for sample in samples]
    assert_agree("donod", norms(model, collate(samples)), expected)


def test_ifd_keeps_the_beginning_of_sequence_before_the_response(samples):
    model = llama(bos_token_id=2)
    samples = [{name: tensor.clone() for name, tensor in sample.items()} for sample in samples]
    expected = []
    for sample in samples:
        sample["input_ids"][0], sample["labels"][0] = 2, IGNORE
        first = int((sample["labels"] != IGNORE).nonzero()[0])
        response = torch.cat([torch.tensor([2]), sample["input_ids"][first:]])
        with torch.no_grad():
            expected.append(nll(*learnt_logits(model, sample)) / response_loss(model, response, 1))
    np.testing.assert_allclose(ifd(model, collate(samples)), expected, rtol=1e-5)


def test_ifd_of_a_response_of_one_token_is_no_ratio(model):
    sample = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORE, IGNORE, 7])}
    longer = {"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([IGNORE, 6, 7, 8])}
    found = ifd(model, collate([sample, longer]))
    assert found[0] == 1
    assert found[1] != 1


def test_where_the_prompt_is_no_help_a_row_goes_first():
    assert below_one(np.array([[0.5], [1.0], [1.5], [0.9]])).tolist() == [0.5, 0, 0, 0.9]


# ---- the pass


@pytest.mark.parametrize("name", CRITERIA)
def test_rows_are_measured_in_their_order_whatever_the_batches(name, tiny_llama, tokenizer):
    model, dataset = tiny_llama(dtype=torch.float64), Dataset.from_list(ROWS)
    scores = score_by(name, model, dataset, tokenizer, arguments(), **COLUMNS)
    alone = score_by(name, model, dataset, tokenizer, arguments(), tokens_per_batch=1, **COLUMNS)
    assert scores.scored.all()
    for column in ("score", *CRITERIA[name].columns):
        np.testing.assert_allclose(scores.column(column), alone.column(column), rtol=1e-4, atol=1e-12)
    assert np.ptp(scores.column("score")) > 0 or name == "repetition"  # of which these short rows have none


def test_the_loss_is_the_scoring_passs_own(tiny_llama, tokenizer):
    model, dataset = tiny_llama(dtype=torch.float64), Dataset.from_list(ROWS)
    mine = score_by("loss", model, dataset, tokenizer, arguments(), **COLUMNS)
    theirs = score_dataset(model, dataset, tokenizer, arguments(), **COLUMNS)
    np.testing.assert_allclose(mine.column("score"), theirs.column("loss"), rtol=1e-6)
    np.testing.assert_array_equal(mine.column("num_tokens"), theirs.column("num_tokens"))


def test_rows_that_cannot_be_measured_keep_their_reason(tiny_llama, tokenizer):
    rows = [*ROWS[:4], {"question": "q", "answer": ""}]
    scores = score_by("el2n", tiny_llama(), Dataset.from_list(rows), tokenizer, arguments(), drop_empty=True, **COLUMNS)
    assert scores.reasons == [None] * 4 + ["empty completion"]
    assert np.isnan(scores.column("score")[4])


TALK = [{"role": "user", "content": "what is 1 ?"}, {"role": "assistant", "content": "it is one"}]


@pytest.mark.parametrize("criterion", ["ifd", "response_ratio", ifd])
def test_a_criterion_of_the_prompt_says_how_many_rows_have_none(criterion, tiny_llama, tokenizer):
    whole = Dataset.from_list([{"messages": TALK * 2}] * 4)  # of which every token is learnt
    with pytest.raises(InputError, match=r"every token of all rows is learnt.*assistant_only_loss=True"):
        score_by(criterion, tiny_llama(), whole, tokenizer, arguments())
    assert score_by("loss", tiny_llama(), whole, tokenizer, arguments()).scored.all()
    assert score_by(criterion, tiny_llama(), whole, tokenizer, arguments(assistant_only_loss=True)).scored.all()
    pairs = Dataset.from_list([{"prompt": each, "completion": "it is one"} for each in ("", "what is 1 ? ", "", "so ")])
    with pytest.warns(UserWarning, match=r"^2 of 4 rows have no prompt") as told:
        score_by(criterion, tiny_llama(), pairs, tokenizer, arguments())
    assert [each.filename for each in told if "have no prompt" in str(each.message)] == [__file__]


def test_a_start_token_is_no_prompt(tokenizer):
    start = int(tokenizer.convert_tokens_to_ids("<|user|>"))
    rows = [([start, 5, 6], 1), ([5, 6, 7], 1), ([5, 6, 7], 0), ([start, 5, 6], 2)]
    dataset = Dataset.from_list([{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in rows])
    prepared = prepared_already(dataset, dict)
    assert without_prompt(prepared, start).tolist() == [True, False, True, False]
    assert without_prompt(prepared, None).tolist() == [False, False, True, False]


def test_a_function_of_ones_own(tiny_llama, tokenizer):
    def tokens(model, batch):
        return batch["attention_mask"].sum(1)

    plain = score_by(tokens, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)
    assert plain.provenance.config["criterion"] == "test_criteria.tokens"
    mine = Criterion(tokens, drop="smallest")
    scores = score_by(mine, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)
    assert scores.column("score").tolist() == scores.column("length").tolist()
    kept = DataSelector(keep=0.5).select(scores)
    assert scores.column("length")[kept.keep].min() >= np.median(scores.column("length")) - 1


@pytest.mark.parametrize("name", CRITERIA)
def test_the_end_that_goes_is_the_criterions_own(name, tiny_llama, tokenizer):
    scores = score_by(name, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)
    mine = DataSelector(keep=0.5).select(scores)
    named = DataSelector(keep=0.5, drop=CRITERIA[name].drop).select(scores)
    assert mine.keep.tolist() == named.keep.tolist()
    assert mine.policy["drop"] == CRITERIA[name].drop
    by_length = DataSelector(keep=0.5, by="num_tokens").select(scores)
    assert by_length.policy["drop"] == "largest"


def test_scores_are_used_again_and_another_criterions_refused(tmp_path, tiny_llama, tokenizer, monkeypatch):
    model, dataset = tiny_llama(), Dataset.from_list(ROWS)
    first = score_by("el2n", model, dataset, tokenizer, arguments(), tmp_path, **COLUMNS)
    monkeypatch.setattr("resofilter_trainer.scoring.criterion.measure_rows", None)  # is not called again
    again = score_by("el2n", model, dataset, tokenizer, arguments(), tmp_path, **COLUMNS)
    assert again.table.equals(first.table)
    with pytest.raises(InputError, match=r"criterion \(el2n / loss\)"):
        score_by("loss", model, dataset, tokenizer, arguments(), tmp_path, **COLUMNS)
    with pytest.raises(InputError, match="holds scores made from something else"):
        score_dataset(model, dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS)


def test_a_function_without_a_name_is_not_kept(tmp_path, tiny_llama, tokenizer):
    with pytest.raises(InputError, match="give it one"):
        score_by(lambda model, batch: None, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), tmp_path)


def test_several_numbers_need_names_and_a_way_to_join_them(tiny_llama, tokenizer):
    def two(model, batch):
        return torch.ones(len(batch["input_ids"]), 2)

    for criterion in (two, Criterion(two, columns=("one",), join=below_one)):
        with pytest.raises(InputError, match="gives 2 numbers a row"):
            score_by(criterion, tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)


def test_an_unknown_criterion_lists_those_there_are(tiny_llama, tokenizer):
    with pytest.raises(InputError, match="no criterion 'beauty'"):
        score_by("beauty", tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)


def test_a_number_that_is_not_finite_names_its_row(tmp_path, tiny_llama, tokenizer):
    def broken(model, batch):
        return torch.where(batch["attention_mask"].sum(1) > 20, torch.nan, 1.0)

    dataset = Dataset.from_list([*ROWS[:3], {"question": "why " * 30, "answer": "so"}])
    with pytest.raises(InputError, match="Row 3 of the dataset"):
        score_by(Criterion(broken), tiny_llama(), dataset, tokenizer, arguments(), tmp_path, **COLUMNS)
    assert not list(tmp_path.iterdir())


def test_it_leaves_alone_what_another_pass_has_done(tmp_path, tiny_llama, tokenizer):
    def broken(model, batch):
        return torch.full((len(batch["input_ids"]),), torch.nan)

    theirs = tmp_path / "parts" / "resonance" / "scoring-float32" / "manifest.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    with pytest.raises(InputError, match="not finite"):
        score_by(Criterion(broken), tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), tmp_path, **COLUMNS)
    score_by("loss", tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), tmp_path, **COLUMNS)
    assert theirs.read_text() == "{}"
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["resonance"]


def test_from_the_shell(tmp_path, tiny_model_dir, capsys):
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    options = ["--dataset", str(tmp_path / "rows.jsonl"), "--prompt_column", "question"]
    options += ["--completion_column", "answer"]
    output = ["--output", str(tmp_path / "scores")]
    main(["score", "--model", str(tiny_model_dir), *options, "--criterion", "ifd", *output])
    assert "30 rows, 30 scored" in capsys.readouterr().out
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    assert "15 smallest 50 %" in capsys.readouterr().out
    assert "ifd" in ScoreTable.load(tmp_path / "scores").table.column_names
    with pytest.raises(SystemExit):
        main(["score", "--model", str(tiny_model_dir), *options, "--criterion", "ifd", "--eps", "1e-4", *output])
    assert "--eps is a setting of resonance" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", "--model", str(tiny_model_dir), *options, "--criterion", "x", "--output", str(tmp_path / "y")])
    assert "--criterion must be one of 'resonance', 'loss'" in capsys.readouterr().err

"""The scoring pass: every row has a score or a reason, whatever the batches; and how far to trust the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.scoring import COLUMNS, ROWS, arguments

from resofilter_trainer import InputError, Recorder, ResonanceConfig, ScoreTable, literal, score_dataset
from resofilter_trainer.scoring import dataset as scoring


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_list(ROWS)


def test_scores_are_the_literal_procedures_on_the_trainers_tokens(dataset, tiny_llama, tokenizer) -> None:
    model = tiny_llama(dtype=torch.float64)
    scores = score_dataset(model, dataset, tokenizer, arguments(), **COLUMNS)
    samples = []
    for row in ROWS:
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        ids = tokenizer(row["question"] + "\n" + row["answer"] + "<eos>")["input_ids"]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    truth = literal(model, samples, ResonanceConfig())
    assert np.abs(scores.column("score") - truth.score).max() < 1e-6 * np.ptp(truth.score)
    np.testing.assert_allclose(scores.column("loss"), truth.loss, rtol=1e-10)
    np.testing.assert_array_equal(scores.column("num_tokens"), truth.num_tokens)
    np.testing.assert_allclose(scores.column("layer_3"), truth.layers[:, 2], rtol=1e-9)
    assert scores.to_pandas()["score"].dtype == np.float64


@pytest.mark.parametrize("tokens", [70, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 100_000))])
def test_the_batch_size_changes_nothing(tokens, dataset, tiny_llama, tokenizer) -> None:
    model = tiny_llama(dtype=torch.float64)
    whole = score_dataset(model, dataset, tokenizer, arguments(), **COLUMNS)
    found = score_dataset(model, dataset, tokenizer, arguments(), tokens_per_batch=tokens, **COLUMNS)
    np.testing.assert_allclose(found.column("score"), whole.column("score"), rtol=1e-12)


def test_rows_with_the_same_prompt_score_as_those_alone(tiny_llama, tokenizer) -> None:
    rows = [{"question": f"what is {i // 4} plus something long ?", "answer": str(i)} for i in range(16)]
    model = tiny_llama(dtype=torch.float64)
    together = score_dataset(model, Dataset.from_list(rows), tokenizer, arguments(), **COLUMNS)
    for i in (0, 7, 15):
        alone = score_dataset(model, Dataset.from_list(rows[i : i + 1]), tokenizer, arguments(), **COLUMNS)
        assert together.column("score")[i] == pytest.approx(alone.column("score")[0], rel=1e-10)


@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")
@pytest.mark.parametrize(
    ("faster", "safe", "forward"), [(True, 0.995, "float32"), (True, -1.0, "bfloat16"), (False, -1.0, "float32")]
)
def test_bfloat16_is_chosen_where_it_is_faster_and_ranks_alike(
    faster, safe, forward, dataset, tiny_llama, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(scoring, "faster_in_bfloat16", lambda device: faster)
    monkeypatch.setattr(scoring, "SAFE", safe)
    model = tiny_llama()  # whose random weights rank otherwise in bfloat16
    scores = score_dataset(model, dataset, tokenizer, arguments(), precision="auto", **COLUMNS)
    chosen = score_dataset(model, dataset, tokenizer, arguments(), precision=forward, **COLUMNS)
    assert scores.provenance.trust.forward == forward
    assert scores.table.equals(chosen.table)
    assert scores.provenance.preparation["autocast"] == "auto"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_bfloat16_is_not_chosen_for_fewer_rows_than_it_is_tried_on(dataset, tiny_llama, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "faster_in_bfloat16", lambda device: True)
    monkeypatch.setattr(scoring, "SAFE", -1.0)
    scores = score_dataset(tiny_llama(), dataset.select(range(15)), tokenizer, arguments(), precision="auto", **COLUMNS)
    assert scores.provenance.trust.forward == "float32"


def test_a_timing_decides_whether_bfloat16_is_faster(monkeypatch) -> None:
    assert scoring.faster_in_bfloat16(torch.device("cpu")) in (True, False)
    monkeypatch.setattr(scoring, "CLEARLY_FASTER", 1e9)
    assert scoring.faster_in_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(scoring, "CLEARLY_FASTER", 0.0)
    assert not scoring.faster_in_bfloat16(torch.device("cpu"))


def test_a_batch_too_large_for_the_device_is_taken_in_halves(dataset, tiny_llama, tokenizer, monkeypatch) -> None:
    truth = score_dataset(tiny_llama(dtype=torch.float64), dataset, tokenizer, arguments(), **COLUMNS)
    real, room = Recorder.__call__, [3]

    def little_memory(self, batch, shared):
        if len(batch["input_ids"]) > room[0]:
            raise torch.OutOfMemoryError("no room")
        return real(self, batch, shared)

    monkeypatch.setattr(Recorder, "__call__", little_memory)
    found = score_dataset(tiny_llama(dtype=torch.float64), dataset, tokenizer, arguments(), **COLUMNS)
    np.testing.assert_allclose(found.column("score"), truth.column("score"), rtol=1e-12)
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        score_dataset(tiny_llama(dtype=torch.float64), dataset, tokenizer, arguments(), **COLUMNS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a whole number of at least 1, got 0"),
        ({"precision": "fp8"}, "precision must be one"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, dataset, tiny_llama, tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        score_dataset(tiny_llama(), dataset, tokenizer, arguments(), **settings, **COLUMNS)


def test_every_row_has_a_score_or_a_reason(tiny_llama, tokenizer) -> None:
    rows = [*ROWS[:4], ROWS[1], {"question": "long " * 40, "answer": "4"}, {"question": "blank", "answer": " "}]
    scores = score_dataset(
        tiny_llama(),
        Dataset.from_list(rows),
        tokenizer,
        arguments(max_length=48),
        drop_duplicates=True,
        drop_empty=True,
        **COLUMNS,
    )
    assert scores.reasons == [None] * 4 + [
        "same prompt as row 1",
        "no token to learn within max_length 48",
        "empty completion",
    ]
    np.testing.assert_array_equal(np.isnan(scores.column("score")), ~scores.scored)
    assert scores.column("sample_id").tolist() == list(range(7))


def test_the_subset_is_scored_again_and_float64_agrees_with_itself(dataset, tiny_llama, tokenizer) -> None:
    scores = score_dataset(tiny_llama(dtype=torch.float64), dataset, tokenizer, arguments(), **COLUMNS)
    trust = scores.provenance.trust
    assert trust.rows == 16
    assert trust.agreement > 0.9999
    assert trust.saturation == pytest.approx(np.ptp(scores.column("score")) / 1e-5)


@pytest.mark.parametrize(("rows", "again"), [(5, 5), (40, 16), (200, 25), (600, 64)])
def test_an_eighth_of_the_rows_is_measured_again_but_some_at_least_and_at_most(rows, again, tiny_llama, tokenizer):
    dataset = Dataset.from_list([{"prompt": f"{i} ?", "completion": str(i)} for i in range(rows)])
    assert score_dataset(tiny_llama(), dataset, tokenizer, arguments()).provenance.trust.rows == again


def test_a_ranking_that_is_noise_is_called_so(dataset, tiny_llama, tokenizer) -> None:
    # random weights and eps 1e-8: the scores lie within 1e-4 of each other, less than bfloat16 can tell apart
    with pytest.warns(UserWarning, match=r"below 0.95 .* larger eps .* norm='l2', or float32"):
        scores = score_dataset(tiny_llama(), dataset, tokenizer, arguments(bf16=True), **COLUMNS)
    assert not scores.provenance.trust.trusted


def test_scores_of_the_same_are_reused_and_others_refused(dataset, tiny_llama, tokenizer, tmp_path) -> None:
    first = score_dataset(tiny_llama(), dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS)
    written = (tmp_path / "scores.parquet").stat().st_mtime_ns
    again = score_dataset(tiny_llama(), dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS)
    assert again.table.equals(first.table)
    turned = tiny_llama()
    turned.config.rms_norm_eps = 1e-3
    for other in (
        lambda: score_dataset(turned, dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS),
        lambda: score_dataset(tiny_llama(seed=1), dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS),
        lambda: score_dataset(
            tiny_llama(), dataset, tokenizer, arguments(), ResonanceConfig(eps=1e-6), tmp_path, **COLUMNS
        ),
        lambda: score_dataset(
            tiny_llama(), dataset.select(range(9)), tokenizer, arguments(), output=tmp_path, **COLUMNS
        ),
    ):
        with pytest.raises(InputError, match="holds scores made from something else"):
            other()
    assert (tmp_path / "scores.parquet").stat().st_mtime_ns == written
    assert ScoreTable.load(tmp_path).provenance == first.provenance


def test_the_model_is_left_as_it_was(dataset, tiny_llama, tokenizer) -> None:
    model = tiny_llama().train()
    forward = model.forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_dataset(model, dataset, tokenizer, arguments(), **COLUMNS)
    assert model.training
    assert model.forward == forward
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tokenizer_of_another_model_is_refused(dataset, tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(100)
    with pytest.raises(InputError, match="tokenizer and model do not belong together"):
        score_dataset(model, dataset, tokenizer, arguments(), **COLUMNS)


def test_float16_is_refused(dataset, tiny_llama, tokenizer) -> None:
    args = arguments()
    args.fp16 = True
    with pytest.raises(InputError, match="vanish in float16"):
        score_dataset(tiny_llama(), dataset, tokenizer, args, **COLUMNS)
    with pytest.raises(InputError, match="vanish in float16"):
        score_dataset(tiny_llama(dtype=torch.float16), dataset, tokenizer, arguments(), **COLUMNS)


def mixed(model: Any, dtype: torch.dtype) -> Any:
    """The model in another precision, but for its embeddings, which come first."""
    model.to(dtype).model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.to(dtype))
    return model


@pytest.mark.filterwarnings("ignore:Rank agreement:UserWarning")
def test_weights_of_which_most_are_half_precision_are_told_or_refused(dataset, tiny_llama, tokenizer) -> None:
    with pytest.warns(UserWarning, match="weights are bfloat16"):
        score_dataset(mixed(tiny_llama(), torch.bfloat16), dataset, tokenizer, arguments(), **COLUMNS)
    with pytest.raises(InputError, match="vanish in float16"):
        score_dataset(mixed(tiny_llama(), torch.float16), dataset, tokenizer, arguments(), **COLUMNS)


def test_rows_with_weights_of_tokens_are_measured_without_and_that_is_said(tiny_llama, tokenizer) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 2)
    weighted = rows.add_column("token_weights", [[0.0, 0.5, 0.0, 1.0]] * 2)
    plain = score_dataset(tiny_llama(), rows, tokenizer, arguments())
    said = r"weights of their tokens \('token_weights'\), and are measured without"
    with pytest.warns(UserWarning, match=said):
        scores = score_dataset(tiny_llama(), weighted, tokenizer, arguments())
    assert scores.table.equals(plain.table)

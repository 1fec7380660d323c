"""Signals with a further forward or a reference model as columns of a pass: their values, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.scoring import COLUMNS, ROWS, arguments
from helpers.tokenizers import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from resofilter_trainer import DataSelector, InputError, ScoreTable, score_by, score_dataset, score_stream
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.scoring import dataset as scoring
from resofilter_trainer.scoring import passes
from resofilter_trainer.scoring.further_passes import FurtherPass
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS, FURTHER

QUESTION = "\nIs this answer right? Answer Yes or No.\nAnswer:"
TALK = [{"role": "user", "content": "what is 1 ?"}, {"role": "assistant", "content": "it is one"}]


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.add_tokens(["Yes", " No", "No"])
    return made


@pytest.fixture(scope="module")
def build(tokenizer) -> Callable[..., LlamaForCausalLM]:
    def made(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        usual = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}
        return LlamaForCausalLM(LlamaConfig(**shape | heads | usual | settings)).to(dtype).eval()

    return made


@pytest.fixture(scope="module")
def reference(build, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    build(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def score(build, tokenizer, reference) -> Callable[..., ScoreTable]:
    """Scores with all signals and the reference, in float64, unless told otherwise."""

    def scored(signals="all", rows=ROWS, model=None, **options) -> ScoreTable:
        double = {"model_init_kwargs": {"dtype": "float64"}}
        given = {"signals": signals, "args": arguments(disable_tqdm=True, **double), "reference": str(reference)}
        model = build() if model is None else model
        return score_dataset(model, Dataset.from_list(rows), tokenizer, **COLUMNS | given | options)

    return scored


@pytest.fixture(scope="module")
def whole(score) -> ScoreTable:
    return score()


def losses(model, ids: list[int], first: int) -> np.ndarray:
    """-ln p of the tokens from `first` on, of one row alone."""
    with torch.no_grad(), own_precision(model):
        log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return -log_p[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:])].numpy()


def test_each_signal_is_its_plain_formula(whole, build, tokenizer):
    base, other = build(), build(seed=1)
    yes, no = (tokenizer.convert_tokens_to_ids(names) for names in (["Yes"], [" No", "No"]))
    for row, given in enumerate(ROWS):
        prompt = tokenizer(given["question"] + "\n")["input_ids"]
        ids = tokenizer(given["question"] + "\n" + given["answer"] + "<eos>")["input_ids"]
        start, alone = len(prompt), ids[len(prompt) :]
        asked = ids[:-1] + tokenizer(QUESTION)["input_ids"]
        answers = [sum(np.exp(-losses(base, [*asked, each], len(asked)))[0] for each in word) for word in (no, yes)]
        expected = {
            "ifd": losses(base, ids, start)[1:].mean() / losses(base, alone, 1).mean(),
            "loss_alone": losses(base, alone, 1).mean(),
            "verdict": np.log(answers[0] / answers[1]),
            "excess": losses(base, ids, start).mean() - losses(other, ids, start).mean(),
            "superfiltering": losses(other, ids, start)[1:].mean() / losses(other, alone, 1).mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(whole.column(name)[row], value, rtol=1e-9, err_msg=name)
    assert all(np.ptp(whole.column(name)) > 0 for name in FURTHER)


@pytest.mark.parametrize("start", [None, 5])
def test_ifd_is_that_of_the_criterion(start, score, build, tokenizer):
    """With a start token, too, before which nothing is left out."""
    model, rows = build(bos_token_id=start), Dataset.from_list(ROWS)
    if start is not None:
        text = [tokenizer(row["question"] + "\n")["input_ids"] for row in ROWS]
        answers = [tokenizer(row["answer"])["input_ids"] for row in ROWS]
        rows = Dataset.from_list(
            [
                {"input_ids": [start, *a, *b], "labels": [-100] * (1 + len(a)) + b}
                for a, b in zip(text, answers, strict=True)
            ]
        )
    columns = COLUMNS if start is None else {}
    found = score_dataset(model, rows, tokenizer, arguments(), signals=["ifd"], **columns)
    with own_precision(model):
        expected = score_by("ifd", model, rows, tokenizer, arguments(), **columns)
    np.testing.assert_allclose(found.column("ifd"), expected.column("ifd"), rtol=1e-9)


@pytest.mark.parametrize("tokens", [70, pytest.param(1, marks=pytest.mark.slow)])
def test_the_batch_size_changes_nothing(tokens, whole, score):
    found = score([*FURTHER], tokens_per_batch=tokens)
    assert found.table.column_names[-1 - len(FURTHER) : -1] == [*FURTHER]
    for name in FURTHER:
        np.testing.assert_allclose(found.column(name), whole.column(name), rtol=1e-9, err_msg=name)


def test_further_signals_change_nothing_else(whole, score):
    without = score(None, reference=None)
    assert whole.table.select(without.table.column_names).equals(without.table)
    assert [name for name in ALL_SIGNALS if name in whole.table.column_names] == [*ALL_SIGNALS]
    assert whole.provenance.config["signals"] == [*ALL_SIGNALS]
    assert whole.table.column_names[-1 - len(FURTHER) : -1] == [*FURTHER]
    assert {*whole.provenance.config} - {*without.provenance.config} == {
        "signals", "reference_weights", "reference_settings",
    }  # fmt: skip


def test_what_signals_share_is_measured_once(score, monkeypatch):
    real, seen = FurtherPass.measure, []

    def measure(self, model, name, forward):
        seen.append(name)
        return real(self, model, name, forward)

    monkeypatch.setattr(FurtherPass, "measure", measure)
    score(["loss_alone", "ifd"], reference=None)
    assert seen == ["alone"]
    score(["superfiltering", "excess", "verdict"])
    assert seen == ["alone", "verdict", "reference", "reference_alone"]


@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")  # bfloat16 is noise to such scores
def test_the_precision_is_that_of_the_pass(score, build, monkeypatch):
    real, seen = FurtherPass._collated, []

    def collated(self, *args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, *args)

    monkeypatch.setattr(FurtherPass, "_collated", collated)
    found = {}
    for precision in ("float32", "bfloat16"):
        seen.clear()
        model = build(dtype=torch.float32)
        found[precision] = score([*FURTHER], model=model, precision=precision, args=arguments())
        assert {*seen} == {precision == "bfloat16"}
    for name in FURTHER:
        pair = [each.column(name) for each in found.values()]
        assert not np.array_equal(*pair)
        assert np.corrcoef(*pair)[0, 1] > 0.98, name


@pytest.mark.parametrize("share", [0.4, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.1, 0.7, 0.95))])
def test_an_interrupted_pass_resumes_in_whichever_forward(share, score, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "LEAST_LOST", 0.0)
    monkeypatch.setattr(passes, "LOST_SHARE", 0.0)
    real, main, calls, stop = FurtherPass._collated, scoring.collate, [], [0]

    def collated(*args):
        calls.append("further")
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        return real(*args)

    def scored(folder: str) -> bytes:
        calls.clear()
        score([*FURTHER], tokens_per_batch=100, output=tmp_path / folder)
        return (tmp_path / folder / "scores.parquet").read_bytes()

    monkeypatch.setattr(FurtherPass, "_collated", collated)
    undisturbed = scored("whole")
    every = len(calls)
    stop[0] = int(share * every)
    with pytest.raises(KeyboardInterrupt):
        scored("cut")
    assert list((tmp_path / "cut" / "parts").rglob("part-*"))
    stop[0] = 0
    monkeypatch.setattr(scoring, "collate", lambda *args: (calls.append("main"), main(*args))[1])
    assert scored("cut") == undisturbed
    assert calls.count("main") == 1  # the trial whether rows may share their beginnings
    assert calls.count("further") <= every - int(share * every) + 1 + 5  # one trial for each forward
    assert not (tmp_path / "cut" / "parts").exists()


def test_scores_belong_to_their_reference(score, build, tokenizer, reference, tmp_path):
    first = score(["excess"], output=tmp_path / "out")
    assert score(["excess"], output=tmp_path / "out").table.equals(first.table)
    assert first.provenance.source["reference"] == str(reference)
    build(seed=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"made from something else: they differ in reference_weights"):
        score(["excess"], output=tmp_path / "out", reference=str(tmp_path / "other"))


def test_a_reference_may_be_an_adapter_on_the_model(score, build, tmp_path):
    tuned = get_peft_model(build(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    tuned.save_pretrained(tmp_path)
    model = build()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = score(["excess"], model=model, reference=str(tmp_path))
    expected = score(None, reference=None).column("loss") - score(
        None, model=tuned.merge_and_unload(), reference=None
    ).column("loss")
    np.testing.assert_allclose(found.column("excess"), expected, rtol=1e-6)  # the adapter's files are float32
    assert np.abs(expected).max() > 0.01
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_row_without_prompt_has_no_ifd(score):
    rows = [{**row, "question": ""} if i in (2, 5) else row for i, row in enumerate(ROWS[:8])]
    with pytest.warns(UserWarning, match="^2 of 8 rows have no prompt.*they have no IFD") as told:
        found = score(["ifd", "superfiltering", "loss_alone"], rows, separator="")
    assert [each.filename for each in told if "no prompt" in str(each.message)] == [__file__]
    for name in ("ifd", "superfiltering"):
        assert np.isnan(found.column(name)).tolist() == [i in (2, 5) for i in range(8)]
    for row in (2, 5):
        np.testing.assert_allclose(found.column("loss_alone")[row], found.column("loss")[row], rtol=1e-9)
        assert DataSelector(by="ifd").select(found).reason[row] == "ifd is nan"


def test_rows_without_any_prompt_leave_ifd_out_or_are_refused(score, capsys):
    talks = [
        {"messages": [TALK[0], {**TALK[1], "content": "so " * i + "it"}]} for i in range(4)
    ]  # of which every token is learnt
    options = {"prompt_column": None, "completion_column": None, "messages_column": "messages"}
    for name in ("ifd", "superfiltering"):
        with pytest.raises(InputError, match=rf"^{name} cannot be measured: .*every token of all rows is learnt"):
            score(["all", name], talks, **options)
    capsys.readouterr()
    names = score("all", talks, **options).provenance.config["signals"]
    assert [name for name in ALL_SIGNALS if name not in names] == ["ifd", "superfiltering"]
    assert capsys.readouterr().out.startswith(
        "Left out of all signals: ifd, superfiltering (it relates a response to its"
    )
    assert score(["ifd"], talks, args=arguments(assistant_only_loss=True), reference=None, **options).scored.all()


def test_a_chat_is_asked_by_its_template(score, build, tokenizer):
    found = score(["verdict"], [{"prompt": TALK[:1], "completion": TALK[1:]}], reference=None,
                  prompt_column=None, completion_column=None)  # fmt: skip
    question = "<|end|><|user|>Is this answer right? Answer Yes or No.<|end|><|assistant|>"
    asked = tokenizer(f"<|user|>what is 1 ?<|end|><|assistant|>it is one{question}")["input_ids"]
    yes, no = (tokenizer.convert_tokens_to_ids(names) for names in (["Yes"], [" No", "No"]))
    each = [[np.exp(-losses(build(), [*asked, token], len(asked)))[0] for token in word] for word in (no, yes)]
    np.testing.assert_allclose(found.column("verdict"), [np.log(sum(each[0]) / sum(each[1]))], rtol=1e-9)


def test_a_response_of_one_token_has_no_loss_alone(build, tokenizer):
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    )
    for some in (rows, rows.select([0])):
        found = score_dataset(build(), some, tokenizer, arguments(), signals=["ifd", "loss_alone"])
        assert np.isnan(found.column("loss_alone")).tolist() == [True, False][: len(some)]
        assert found.column("ifd")[0] == 1


def test_what_the_tokenizer_or_the_length_rules_out(score, build, tmp_path, capsys):
    plain = make_tokenizer()
    rows, options = Dataset.from_list(ROWS[:4]), {"args": arguments(), **COLUMNS}
    with pytest.raises(InputError, match=r"^verdict cannot be measured: .* no token for the answer 'No'"):
        score_dataset(build(), rows, plain, signals="verdict", **options)
    with pytest.raises(InputError, match=r"^verdict cannot .* \d+ tokens and the model 40 positions \(lower max_"):
        score("verdict", model=build(max_position_embeddings=40), reference=None)
    capsys.readouterr()
    names = score_dataset(build(), rows, plain, signals="all", **options).provenance.config["signals"]
    assert [name for name in ALL_SIGNALS if name not in names] == ["verdict", "excess", "superfiltering"]
    told = capsys.readouterr().out
    assert "verdict (the tokenizer has no token for the answer 'No'); excess, superfiltering (no reference" in told


@pytest.mark.parametrize(
    ("signals", "reference", "expected"),
    [
        ("exces", None, r"got 'exces'. Did you mean 'excess'"),
        (["loss", "excess"], None, r"^excess needs a second model: pass reference="),
        ("superfiltering", None, r"^superfiltering needs a second model: pass reference="),
        ("ifd", "/nowhere", r"^reference= is for the signals excess and superfiltering: ask for one"),
        (None, "/nowhere", r"^reference= is for the signals excess and superfiltering: ask for one"),
        ("excess", "/nowhere", r"^There is no reference model at '/nowhere'"),
        ("excess", 5, r"reference must be the name or folder of a model"),
        ("loss_first", None, r"signals must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(signals, reference, expected, tmp_path):
    with pytest.raises(InputError, match=expected):
        score_dataset(
            "/nowhere/model", Dataset.from_list(ROWS), args=arguments(), signals=signals, reference=reference,
            output=tmp_path / "out", **COLUMNS,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_vocabulary_is_refused(score, build, tmp_path):
    build().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has another vocabulary than the base model"):
        score("excess", reference=str(tmp_path))


def test_a_reference_that_computes_no_numbers_is_named_by_its_first_row(score, build, tokenizer, tmp_path):
    broken = build()
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    broken.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^Row \d+ of the dataset has a number that is not finite \(reference\)"):
        score("excess", reference=str(tmp_path))


def test_a_stream_is_read_once(build, tokenizer, tmp_path):
    stream = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in ROWS[:6]])
    stream = stream.to_iterable_dataset()
    for name in FURTHER:
        with pytest.raises(InputError, match=rf"^{name} takes a forward of its own, and a stream is read once"):
            score_stream("/nowhere/model", stream, tmp_path / "out", args=arguments(), signals=["all", name])
    found = score_stream(build(), stream, tmp_path / "out", tokenizer, arguments(), signals="all")
    assert {*FURTHER} & {*found.table.column_names} == set()

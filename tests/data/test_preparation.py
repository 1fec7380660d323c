"""What is scored is what would be trained: the same tokens and labels as SFTTrainer's, row for row."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from helpers.tokenizers import make_tokenizer
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import InputError
from resofilter_trainer.data.preparation import prepare
from resofilter_trainer.data.surveys import ROW_POSITION

PAIRS = [{"prompt": f"what is {i} + 1 ? ", "completion": "x " * i + str(i + 1)} for i in range(1, 9)]
FORMATS: dict[str, tuple[list[dict], dict]] = {
    "prompt and completion": (PAIRS, {}),
    "whole sequence of a pair": (PAIRS, {"completion_only_loss": False}),
    "conversational pair": (
        [
            {"prompt": [message("user", p["prompt"])], "completion": [message("assistant", p["completion"])]}
            for message in [lambda role, content: {"role": role, "content": content}]
            for p in PAIRS
        ],
        {},
    ),
    "messages": (
        [
            {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
            for p in PAIRS
        ],
        {},
    ),
    "messages, assistant only": (
        [
            {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
            for p in PAIRS
        ],
        {"assistant_only_loss": True},
    ),
    "text": ([{"text": p["prompt"] + p["completion"]} for p in PAIRS], {}),
    "another text field": ([{"body": p["prompt"] + p["completion"]} for p in PAIRS], {"dataset_text_field": "body"}),
    "tokens and labels": (
        [{"input_ids": [5, 6, 7, 8][: i % 3 + 2], "labels": [-100, 6, 7, 8][: i % 3 + 2]} for i in range(8)],
        {},
    ),
}


def arguments(tmp_path, **settings) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True, **settings)


def with_rows(examples: list[dict]) -> Dataset:
    return Dataset.from_list(examples).add_column(ROW_POSITION, np.arange(len(examples)))


@pytest.mark.parametrize("max_length", [None, 64, 22])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_labels_are_the_trainers(name, max_length, tmp_path, tokenizer, tiny_llama) -> None:
    examples, settings = FORMATS[name]
    args = arguments(tmp_path, max_length=max_length, **settings)
    prepared = prepare(with_rows(examples), tokenizer, args)
    trainer = SFTTrainer(tiny_llama(), args, train_dataset=with_rows(examples), processing_class=tokenizer)
    for column in (ROW_POSITION, "input_ids", "labels"):
        assert list(prepared.dataset[column]) == list(trainer.train_dataset[column])
    assert prepared.lengths.tolist() == [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert set(prepared.sample_ids) | set(prepared.reasons) == set(range(len(examples)))


@pytest.mark.parametrize("settings", [{"packing": True}, {"padding_free": True}, {"shuffle_dataset": True}])
def test_packing_padding_and_order_change_no_sample(settings, tmp_path, tokenizer) -> None:
    plain = prepare(with_rows(PAIRS), tokenizer, arguments(tmp_path))
    assert prepare(with_rows(PAIRS), tokenizer, arguments(tmp_path, **settings)).fingerprint == plain.fingerprint


def test_a_row_cut_down_to_its_prompt_has_a_reason(tmp_path, tokenizer) -> None:
    examples = [*PAIRS, {"prompt": "a very long prompt " * 10, "completion": "4"}]
    prepared = prepare(with_rows(examples), tokenizer, arguments(tmp_path, max_length=40))
    assert prepared.reasons == {8: "no token to learn within max_length 40"}


def test_a_row_with_every_label_masked_has_a_reason_without_truncation_too(tmp_path, tokenizer) -> None:
    examples = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6], "labels": [-100, -100]}]
    assert prepare(with_rows(examples), tokenizer, arguments(tmp_path, max_length=None)).reasons == {
        1: "no token to learn: every label is masked"
    }


def test_a_first_token_is_never_learnt_so_one_token_is_no_sample(tmp_path, tokenizer) -> None:
    examples = [{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    assert list(prepare(with_rows(examples), tokenizer, arguments(tmp_path)).reasons) == [0]


def test_nothing_to_learn_anywhere_is_an_error(tmp_path, tokenizer) -> None:
    with pytest.raises(InputError, match="None of the 1 rows has a token to learn"):
        prepare(
            with_rows([{"input_ids": [5, 6], "labels": [-100, -100]}]), tokenizer, arguments(tmp_path, max_length=None)
        )


def test_a_template_without_generation_markers_is_one_line(tmp_path) -> None:
    bare = make_tokenizer()
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="TRL cannot prepare this dataset") as error:
        prepare(with_rows(FORMATS["messages"][0]), bare, arguments(tmp_path, assistant_only_loss=True))
    assert "\n" not in str(error.value)


def test_the_tokenizer_and_the_arguments_are_left_alone(tmp_path) -> None:
    without_pad = make_tokenizer(eos_token="<eos>")
    args = arguments(tmp_path, packing=True)
    prepare(with_rows(PAIRS), without_pad, args)
    assert without_pad.pad_token is None
    assert args.packing
    assert args.output_dir == str(tmp_path)


def test_the_fingerprint_follows_the_tokens(tmp_path, tokenizer) -> None:
    same = [prepare(with_rows(PAIRS), tokenizer, arguments(tmp_path)).fingerprint for _ in range(2)]
    other = prepare(with_rows([*PAIRS[:-1], {"prompt": "what ", "completion": "4"}]), tokenizer, arguments(tmp_path))
    assert same[0] == same[1] != other.fingerprint

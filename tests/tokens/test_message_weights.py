"""Weights of messages: which tokens have them, a step against the loss written out, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset, Json, List
from helpers.training import arguments, llama, train
from helpers.versions import skip_without
from torch.nn import functional as F

from resofilter_trainer import InputError, TokenRule, TokenWeights, clean_dataset
from resofilter_trainer.io.digest import same_rows
from resofilter_trainer.report import read_contents

ASSISTANT = {"assistant_only_loss": True}


def chat(*weights: float | None) -> list[dict[str, Any]]:
    """A question and an answer for each weight, each of another length."""
    messages = []
    for turn, weight in enumerate(weights):
        messages += [{"role": "user", "content": f"question {turn} ?"}]
        messages += [{"role": "assistant", "content": "the fox " * (turn + 1), "weight": weight}]
    return messages


CHATS = [chat(0.25, None, 1.0), chat(0.0, 0.5), chat(None)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "base"
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weigh(place, tmp_path, rows: Any, options: dict[str, Any] | None = None, **settings: Any):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([{"messages": each} for each in rows])
    args = arguments(tmp_path, **{**ASSISTANT, **settings})
    return clean_dataset(str(place), dataset, rule="messages", args=args, **(options or {}))


def plain_weights(messages: list[dict[str, Any]], tokenizer) -> list[float]:
    """Of each token: the weight of the message that the text until there ends in; 0 outside of answers."""
    found: list[float] = []
    for number, message in enumerate(messages, start=1):
        text = tokenizer.apply_chat_template(messages[:number], tokenize=False)
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - len(found)
        weight = message.get("weight")
        answered = message["role"] == "assistant"
        head = 1 if answered else tokens  # <|assistant|>
        found += [0.0] * head + [1.0 if weight is None else weight] * (tokens - head)
    return found


def test_each_token_has_the_weight_of_its_message(place, tmp_path, tokenizer):
    cleaned = weigh(place, tmp_path, CHATS, {"output": tmp_path / "out"})
    assert [row["token_weights"] for row in cleaned.dataset] == [plain_weights(each, tokenizer) for each in CHATS]
    assert cleaned.summary["rule"] == "messages"
    assert read_contents(tmp_path / "out").cleaned == cleaned.selection
    again = weigh(place, tmp_path, CHATS, {"output": tmp_path / "out"})
    assert again.selection == cleaned.selection
    rows = Dataset.from_list([{"messages": each} for each in CHATS])
    assert same_rows(cleaned.selection.scores.provenance.source["content"], rows)
    changed = [*CHATS[:2], chat(0.5)]  # the same tokens
    again = weigh(place, tmp_path, changed, {"output": tmp_path / "out"})
    assert [row["token_weights"] for row in again.dataset] == [plain_weights(each, tokenizer) for each in changed]
    with pytest.raises(InputError, match="they differ in"):
        weigh(place, tmp_path, [*CHATS[:2], chat(0.5, 0.5)], {"output": tmp_path / "out"})


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
def test_a_chat_that_is_cut_at_its_beginning_keeps_the_weights_of_its_end(place, tmp_path):
    rows = [chat(0.25, 0.5, 0.75)]
    whole = weigh(place, tmp_path, rows).dataset[0]["token_weights"]
    cut = weigh(place, tmp_path, rows, max_length=len(whole) - whole.index(0.25) - 6, truncation_mode="keep_end")
    assert cut.dataset[0]["token_weights"] == whole[-len(cut.dataset[0]["token_weights"]) :]
    assert 0.25 not in cut.dataset[0]["token_weights"]


def test_other_lists_are_no_messages(place, tmp_path):
    sources = [[{"name": "a", "weight": 5.0}]] * len(CHATS)
    rows = Dataset.from_dict({"messages": CHATS, "sources": sources})
    found, expected = weigh(place, tmp_path, rows).dataset, weigh(place, tmp_path, CHATS).dataset
    assert found["token_weights"][:] == expected["token_weights"][:]


def test_a_step_is_the_one_written_out(place, tmp_path, tokenizer):
    skip_without("log_probs")
    rows = weigh(place, tmp_path, CHATS).dataset
    model = llama(len(tokenizer))
    by_hand, total, tokens = copy.deepcopy(model), torch.zeros(()), 0
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 3, **sgd}
    outcome = train(tmp_path, tokenizer, TokenWeights(), dataset=rows, model=model, **settings)
    for messages, row in zip(CHATS, rows, strict=True):
        ids, weights = torch.tensor(row["input_ids"]), torch.tensor(plain_weights(messages, tokenizer))
        losses = F.cross_entropy(by_hand(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + (losses * weights[1:]).sum()
        tokens += sum(label != -100 for label in row["labels"][1:])
    (total / tokens).backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(outcome.weights[name], parameter.detach() - 0.1 * parameter.grad, msg=name)


def test_other_forms_of_rows_and_a_rule_of_ones_own(place, tmp_path, tokenizer):
    whole = weigh(place, tmp_path, CHATS).dataset.to_list()
    as_json = Dataset.from_list([{"messages": each} for each in CHATS]).cast_column("messages", List(Json()))
    assert weigh(place, tmp_path, as_json).dataset.to_list() == whole
    longest = max(len(row["input_ids"]) for row in whole)
    cut = weigh(place, tmp_path, CHATS, max_length=longest - 3).dataset.to_list()
    assert cut[0]["token_weights"] == whole[0]["token_weights"][:-3]
    pairs = Dataset.from_list([{"prompt": each[:-1], "completion": each[-1:]} for each in (chat(0.5), chat(None))])
    found = weigh(place, tmp_path, pairs, assistant_only_loss=False).dataset["token_weights"]
    assert {*found[0]} == {0, 0.5}
    assert {*found[1]} == {0, 1}
    both = TokenRule("both", lambda tokens: tokens.message_weight * (tokens.offsets[-1] > 0), ["message_weight"])
    rows = Dataset.from_list([{"messages": each} for each in CHATS])
    mine = clean_dataset(str(place), rows, rule=both, args=arguments(tmp_path, **ASSISTANT))
    assert mine.dataset["token_weights"][:] == [row["token_weights"] for row in whole]


USER = [{"role": "user", "content": "a", "weight": 0.5}, {"role": "assistant", "content": "b", "weight": 1.0}]


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([chat(-0.5)], {}, "Message 1 of row 0 has weight=-0.5: give a number from 0 to 1"),
        ([chat(0.5), chat(0.5, float("nan"))], {}, "Message 3 of row 1 has weight=nan: give a number"),
        ([chat(2.0)], {}, "weight=2.0: give a number from 0 to 1. Divide larger ones by the largest"),
        ([chat("much")], {}, "weight='much': give a number"),
        ([chat(None)], {}, "No message has a 'weight'"),
        ([USER], {}, "Row 0 has weight=0.5 on a message of the role 'user' that is not learnt"),
        ([chat(0.5)], {"assistant_only_loss": False}, "need assistant_only_loss=True, or completions of one message"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(rows, settings, expected, place, tmp_path):
    with pytest.raises(InputError, match=expected):
        weigh(place, tmp_path, rows, **settings)


def test_a_template_that_marks_no_message_by_itself_is_refused(place, tmp_path, tokenizer):
    """All of a chat is one part here, as the template marks the user's messages as well."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% generation %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endgeneration %}"
        "{% endfor %}"
    )
    with pytest.raises(InputError, match="Row 0 has 3 messages to learn and 1 parts that are learnt"):
        weigh(place, tmp_path, CHATS, {"processing_class": other})


def test_in_a_run_the_rule_is_refused():
    with pytest.raises(InputError, match=r"needs 'message_weight': .* Clean first"):
        TokenWeights(rule="messages")

"""Rows as people have them, through to tokens: what is scored is what SFTTrainer trains on after `map_columns`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from helpers.tokenizers import CHAT_TEMPLATE, make_tokenizer
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import InputError, map_columns
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data.files import load_rows
from resofilter_trainer.data.loading import usable_rows
from resofilter_trainer.data.preparation import PreparedRows, prepare

PAIR = {"prompt_column": "q", "completion_column": "r"}
CHAT = {**PAIR, "conversational": True}
ASSISTANT = {"assistant_only_loss": True}
TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% if style is defined %}[{{ style }}]{% endif %}" + CHAT_TEMPLATE  # is it not given, or given as None?
)
CALLS = "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }}{% endfor %}"
STRICT = (  # as many are: no other role, and in turns
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must "
    "alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)
SILENT = (
    "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}{% elif m.role == 'assistant' %}"
    "{% generation %}A{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


def user(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **others}


def said(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def shared(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(values)]


def talk(*contents: str) -> list[dict[str, Any]]:
    return [(user, said)[turn % 2](content) for turn, content in enumerate(contents)]


GOOD = talk("what is 1 ?", "one")


def arguments(**settings: Any) -> SFTConfig:
    return SFTConfig(output_dir="unused", bf16=False, report_to="none", use_cpu=True, **settings)


def tokenizer_of(template: str | None = TEMPLATE) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def prepared(
    dataset: Dataset, mapping: dict, tokenizer: Any, drop_empty: bool = True, **settings: Any
) -> tuple[PreparedRows, dict[int, str], list[str]]:
    """The rows as every pass opens them; why the others are skipped; and what is said about them."""
    notes: list[str] = []
    args = arguments(**settings)
    rows, reasons = usable_rows(dataset, ColumnMapping(**mapping), args, False, drop_empty, notes)
    found = prepare(rows, tokenizer, args, drop_empty)
    return found, reasons | found.reasons, notes


def text(found: PreparedRows, tokenizer: Any, learnt: bool = False) -> list[str]:
    """What every row says to the model, or what is learnt of it."""
    return [
        tokenizer.decode([i for i, label in zip(*row, strict=True) if not learnt or label != -100])
        for row in zip(found.dataset["input_ids"], found.dataset["labels"], strict=True)
    ]


def plain(*messages: tuple[str, str]) -> str:
    return "".join(f"<|{role}|>{content}<|end|>" for role, content in messages)


BOTH = plain(("user", "hi"), ("assistant", "ho"))
# rows, mapping, settings; what the first row says, what is learnt of it, and why which rows are skipped
MESSY: dict[str, tuple[list[dict], dict, dict, str, str, dict[int, str]]] = {
    "roles of ShareGPT": (
        [{"conversations": shared("hi", "ho")}, {"conversations": shared("a", "b")}],
        {},
        {},
        BOTH,
        BOTH,
        {},
    ),
    "roles, row by row": (
        [
            {"messages": talk("hi", "ho")},
            {"messages": [{"role": "human", "content": "a"}, {"role": "GPT", "content": "b"}]},
        ],
        {},
        ASSISTANT,
        BOTH,
        "ho<|end|>",
        {},
    ),
    "conversations with TRL's keys": ([{"conversations": talk("hi", "ho")}], {}, {}, BOTH, BOTH, {}),
    "turns of another name": ([{"dialogue": shared("hi", "ho")}], {"messages_column": "dialogue"}, {}, BOTH, BOTH, {}),
    "a system beside the turns": (
        [{"conversations": shared("hi", "ho"), "system": each} for each in ("be", "", None)],
        {},
        ASSISTANT,
        plain(("system", "be")) + BOTH,
        "ho<|end|>",
        {},
    ),
    "two systems": (
        [
            {"messages": [{"role": "system", "content": "be"}, *talk("hi", "ho")], "system": each}
            for each in ("be", "do")
        ],
        {},
        ASSISTANT,
        plain(("system", "be")) + BOTH,
        "ho<|end|>",
        {1: "column 'system' differs"},
    ),
    "history, system and other columns": (
        [
            {"q": "hi", "r": "ho", "history": [["a", "b"]], "system": "be", "id": 1},
            {"q": "hi", "r": "ho", "history": [], "system": None, "id": 2},
            {"q": "hi", "r": "ho", "history": [["a"]], "system": None, "id": 2},
        ],
        CHAT,
        {},
        plain(("system", "be"), ("user", "a"), ("assistant", "b")) + BOTH,
        "ho<|end|>",
        {2: "'history' is not"},
    ),
    "a history as text": (
        [{"q": "hi", "r": "ho", "history": each} for each in ('[["a", "b"]]', "", "[]", "a, b")],
        CHAT,
        {},
        plain(("user", "a"), ("assistant", "b")) + BOTH,
        "ho<|end|>",
        {3: "'history' is no JSON"},
    ),
    "a history that is empty": (
        [{"q": "hi", "r": "ho", "history": [], "system": ""}],
        PAIR,
        {},
        "hi\nho<eos>",
        "ho<eos>",
        {},
    ),
    "tools as text": (
        [{"messages": talk("hi", "ho"), "tools": each} for each in ('[{"name": "f"}]', "", None, "[{")],
        {},
        ASSISTANT,
        '[[{"name": "f"}]]' + BOTH,
        "ho<|end|>",
        {3: "'tools' is no JSON"},
    ),
    "template settings, or null": (
        [{"messages": talk("hi", "ho"), "chat_template_kwargs": each} for each in ({"style": "x"}, None)],
        {},
        ASSISTANT,
        "[x]" + BOTH,
        "ho<|end|>",
        {},
    ),
    "template settings as text": (
        [{"messages": talk("hi", "ho"), "chat_template_kwargs": each} for each in ('{"style": "x"}', "", "{", "[]")],
        {},
        ASSISTANT,
        "[x]" + BOTH,
        "ho<|end|>",
        {2: "chat_template_kwargs' is no JSON", 3: "chat_template_kwargs' holds a list"},
    ),
    "mapped, with tools": (
        [{"dialogue": talk("hi", "ho"), "tools": '[{"name": "f"}]', "chat_template_kwargs": {"style": "x"}, "id": 1}],
        {"messages_column": "dialogue"},
        {},
        '[[{"name": "f"}]][x]' + BOTH,
        '[[{"name": "f"}]][x]' + BOTH,
        {},
    ),
    "a mapped pair, with tools": (
        [{"q": "hi", "r": "ho", "tools": '[{"name": "f"}]', "chat_template_kwargs": {"style": "x"}}],
        CHAT,
        {},
        '[[{"name": "f"}]][x]' + BOTH,
        "ho<|end|>",
        {},
    ),
    "only the last message is learnt": (
        [
            {"messages": [user("a"), said("b", weight=0), user("hi"), said("ho", weight=1)]},
            {"messages": [user("hi", weight=0), said("ho", weight=1)]},
        ],
        {},
        {},
        plain(("user", "a"), ("assistant", "b")) + BOTH,
        "ho<|end|>",
        {},
    ),
    "only the last message, in few rows": (
        [
            {"messages": talk("hi", "ho")},
            {"messages": talk("a", "b")},
            {"messages": [user("a"), said("b", loss=False), user("hi"), said("ho", loss=True)]},
        ],
        {},
        {},
        BOTH,
        BOTH,
        {2: "flags say what is learnt of it, and not of most rows"},
    ),
    "flags that say what is learnt anyway": (
        [{"messages": [user("a", train=False), said("b", train=True), user("c", train=False), said("d", train=True)]}],
        {},
        ASSISTANT,
        plain(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        "b<|end|>d<|end|>",
        {},
    ),
    "a fraction as a weight": (
        [{"messages": [user("hi"), said("ho", weight=each)]} for each in (1.0, 0.5)],
        {},
        {},
        BOTH,
        BOTH,
        {1: "message 1 has weight=0.5"},
    ),
    "a prompt that repeats the first message": (
        [{"prompt": each, "messages": talk("hi", "ho")} for each in ("hi", None, "bye")],
        {},
        {},
        BOTH,
        BOTH,
        {2: "column 'prompt' is not its first message"},
    ),
    "a prompt beside mapped messages": (
        [{"prompt": "bye", "messages": talk("hi", "ho")}],
        {"messages_column": "messages"},
        {},
        BOTH,
        BOTH,
        {},
    ),
    "a prompt that is null": (
        [{"prompt": each, "completion": "ho"} for each in ("hi", None, "")],
        {},
        {},
        "hiho<eos>",
        "ho<eos>",
        {1: "the prompt is null"},
    ),
    "a prompt without a message": (
        [{"prompt": each, "completion": talk("", "ho")[1:]} for each in (talk("hi"), [], None)],
        {},
        {},
        BOTH,
        "ho<|end|>",
        {1: "the prompt is null or has no message", 2: "the prompt is null"},
    ),
    "nothing that is taught": (
        [{"prompt": "hi", "completion": each} for each in ("ho", None, " ")],
        {},
        {},
        "hiho<eos>",
        "ho<eos>",
        {1: "empty completion", 2: "empty completion"},
    ),
    "conversations without a message": (
        [{"messages": each} for each in (talk("hi", "ho"), [], None)],
        {},
        {},
        BOTH,
        BOTH,
        {1: "empty completion", 2: "empty completion"},
    ),
    "a message that is null": (
        [{"messages": each} for each in (talk("hi", "ho"), [*talk("hi"), None, *talk("", "ho")[1:]])],
        {},
        {},
        BOTH,
        BOTH,
        {1: "message 1 is null"},
    ),
    "a user who gets no answer": (
        [{"messages": each} for each in (talk("hi", "ho"), talk("hi"))],
        {},
        ASSISTANT,
        BOTH,
        "ho<|end|>",
        {1: "no assistant message"},
    ),
    "users alone, of whom everything is learnt": (
        [{"messages": talk("hi")}],
        {},
        {},
        plain(("user", "hi")),
        plain(("user", "hi")),
        {},
    ),
    "content of one part": (
        [
            {"messages": [user([{"type": "text", "text": "hi"}]), said([{"type": "text", "text": "ho"}])]},
            {"messages": [user([{"type": "image", "text": None}]), said([{"type": "text", "text": "ho"}])]},
        ],
        {},
        {},
        BOTH,
        BOTH,
        {1: "message 0 has the parts: image"},
    ),
    "an unknown role of ShareGPT": (
        [{"conversations": shared("hi", "ho")}, {"conversations": [{"from": "observer", "value": "a"}]}],
        {},
        {},
        BOTH,
        BOTH,
        {1: "message 0 has the role 'observer'"},
    ),
    "a pair of messages": (
        [{"prompt": shared("hi"), "completion": shared("", "ho")[1:], "system": "be"}],
        {},
        {},
        plain(("system", "be")) + BOTH,
        "ho<|end|>",
        {},
    ),
    "a text that TRL would end instead": (
        [{"q": "hi", "r": "ho", "text": "hi ho"}],
        PAIR,
        {},
        "hi\nho<eos>",
        "ho<eos>",
        {},
    ),
    "messages and a pair": (
        [{"prompt": "hi", "completion": "ho", "messages": talk("a", "b")}],
        {},
        {},
        "hiho<eos>",
        "ho<eos>",
        {},
    ),
    "messages and a completion": ([{"completion": "a", "messages": talk("hi", "ho")}], {}, {}, BOTH, BOTH, {}),
    "tokens beside a mapped pair": ([{"input_ids": [5], "q": "hi", "r": "ho"}], PAIR, {}, "hi\nho<eos>", "ho<eos>", {}),
    "text with empty tools": ([{"text": "hi ho", "tools": ""}], {}, {}, "hi ho<eos>", "hi ho<eos>", {}),
    "images beside a mapped pair": ([{"q": "hi", "r": "ho", "image": "a.png"}], PAIR, {}, "hi\nho<eos>", "ho<eos>", {}),
    "tokens of which some are missing": (
        [
            {"input_ids": [5, 6], "labels": [-100, 6], "assistant_masks": [0, 1]},
            {"input_ids": [5, 6], "labels": [6], "assistant_masks": [0, 1]},
            {"input_ids": [5, 6], "labels": None, "assistant_masks": [0, 1]},
            {"input_ids": [5, None], "labels": [-100, 6], "assistant_masks": [0, 1]},
            {"input_ids": [5, -6], "labels": [-100, 6], "assistant_masks": [0, 1]},
        ],
        {},
        {},
        '!"',
        '"',
        {
            1: "1 entries in column 'labels', 2 in 'input_ids'",
            2: "0 entries in column 'labels', 2 in 'input_ids'",
            3: "column 'input_ids' has an entry that is null or negative",
            4: "column 'input_ids' has an entry that is null or negative",
        },
    ),
    "masks of which some are missing": (
        [
            {"input_ids": [5, 6], "completion_mask": [0, 1]},
            {"input_ids": [5, 6], "completion_mask": [0, None]},
            {"input_ids": [5, 6], "completion_mask": [0, 1, 1]},
            {"input_ids": None, "completion_mask": None},
        ],
        {},
        {"completion_only_loss": True},
        '!"',
        '"',
        {
            1: "column 'completion_mask' has an entry that is null",
            2: "3 entries in column 'completion_mask', 2 in 'input_ids'",
            3: "empty completion",
        },
    ),
    "tokens with empty media": (
        [{"input_ids": [5, 6], "labels": [-100, 6], "images": None, "videos": [], "audios": ""}],
        {},
        {},
        '!"',
        '"',
        {},
    ),
}


@pytest.mark.parametrize("name", MESSY)
def test_what_is_scored_is_what_the_trainer_trains_on(name, tiny_llama):
    rows, mapping, settings, says, learns, why = MESSY[name]
    dataset, tokenizer = Dataset.from_list(rows), tokenizer_of()
    found, reasons, _ = prepared(dataset, mapping, tokenizer, **settings)

    assert text(found, tokenizer)[0] == says
    assert text(found, tokenizer, learnt=True)[0] == learns
    assert sorted(reasons) == sorted(why)
    assert all(part in reasons[row] for row, part in why.items())
    assert found.sample_ids.tolist() == [row for row in range(len(rows)) if row not in why]

    good = dataset.select(found.sample_ids)
    mapped = map_columns(good, ColumnMapping(**mapping), args=arguments(**settings))
    trains = SFTTrainer(tiny_llama(), arguments(**settings), train_dataset=mapped, processing_class=tokenizer)
    for column in ("input_ids", "labels"):
        assert list(trains.train_dataset[column]) == list(found.dataset[column])
    assert list(map_columns(mapped, ColumnMapping(), args=arguments(**settings))) == list(mapped)


@pytest.mark.parametrize("name", [name for name in MESSY if MESSY[name][-1]])
def test_without_drop_empty_one_line_names_the_rows_and_the_first_reason(name):
    rows, mapping, settings, *_, why = MESSY[name]
    with pytest.raises(InputError) as refused:
        prepared(Dataset.from_list(rows), mapping, tokenizer_of(), drop_empty=False, **settings)
    line = str(refused.value)
    assert f"{len(why)} of {len(rows)} rows" in line
    assert next(iter(why.values())) in line
    assert all(str(row) in line for row in why)
    assert "drop_empty=True" in line


def test_map_columns_refuses_rows_that_have_no_meaning():
    with pytest.raises(
        InputError, match=r"^1 of 2 rows cannot be read. Row 1: message 0 is null. Correct or remove them.$"
    ):
        map_columns(Dataset.from_list([{"messages": GOOD}, {"messages": [None, *GOOD]}]), ColumnMapping())


def test_every_other_column_stays():
    columns = {"id": 7, "source": "a", "tools": '[{"name": "f"}]', "videos": ["a"]}
    for row, mapping in (
        ({"q": "hi", "r": "ho"}, PAIR),
        ({"q": "hi", "r": "ho"}, CHAT),
        ({"dialogue": shared("hi", "ho")}, {"messages_column": "dialogue"}),
        ({"conversations": shared("hi", "ho")}, {}),
        ({"body": "hi ho"}, {"text_column": "body"}),
    ):
        mapped = map_columns(Dataset.from_list([{**row, **columns}]), ColumnMapping(**mapping))
        assert {name: mapped[0][name] for name in columns} == columns
        assert not set(row) & set(mapped.column_names)


def test_rows_in_trls_own_formats_are_the_same_object():
    for row in (
        {"messages": GOOD, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"style": "x"}, "id": 1},
        {"prompt": GOOD[:1], "completion": GOOD[1:]},
        {"prompt": "hi", "completion": "ho", "text": "a", "id": 1},
        {"text": "a"},
        {"input_ids": [5, 6], "labels": [5, 6], "prompt": "hi", "completion": "ho"},
    ):
        dataset = Dataset.from_list([row])
        assert map_columns(dataset, ColumnMapping()) is dataset


def test_what_was_read_as_something_else_is_said():
    rows = [{"conversations": shared("hi", "ho"), "system": "be"}, {"conversations": shared("hi", "ho"), "system": ""}]
    assert prepared(Dataset.from_list(rows), {}, tokenizer_of())[2] == [
        "column 'system' became the first message",
        "role gpt was read as assistant",
        "role human was read as user",
    ]
    assert prepared(Dataset.from_list([{"messages": GOOD}]), {}, tokenizer_of())[2] == []


# ---- columns that cannot stay


@pytest.mark.parametrize(
    ("row", "mapping", "told"),
    [
        ({"q": "a", "r": "b", "prompt": "c"}, PAIR, "'q' is to become 'prompt', and there is another column 'prompt'"),
        ({"q": "a", "r": "b", "completion": "c"}, PAIR, "'r' is to become 'completion'"),
        ({"q": talk("a"), "messages": GOOD}, {"messages_column": "q"}, "'q' is to become 'messages'"),
        ({"q": "a", "text": "b"}, {"text_column": "q"}, "'q' is to become 'text'"),
        ({"q": "a", "r": "b", "system": "c"}, PAIR, "'system' belongs before the prompt, .*conversational=True"),
        (
            {"q": "a", "r": "b", "history": [["c", "d"]]},
            PAIR,
            "'history' belongs before the prompt, .*conversational=True",
        ),
        ({"prompt": "a", "completion": "b", "system": "c"}, {}, "'system' belongs before the prompt"),
        ({"messages": GOOD, "conversations": GOOD}, {}, 'messages_column="messages" or'),
        ({"prompt": "a", "text": "a b"}, {}, "'prompt' has no 'completion' beside it: pass text_column=\"text\""),
        ({"messages": "[]"}, {}, "'messages' holds text, not a list of messages"),
        ({"conversations": ["a", "b"]}, {}, "'conversations' holds list, not a list of messages"),
        ({"prompt": "a", "completion": GOOD[1:]}, {}, "One of 'prompt' and 'completion' holds messages"),
        ({"prompt": "a", "completion": 3}, {}, "'completion' holds whole numbers.*completion_column="),
        ({"text": 3}, {}, "'text' holds whole numbers.*text_column="),
        ({"messages": GOOD, "image": "a.png"}, {}, r"'image' is not empty \(row 0\).*remove_columns\('image'\)"),
        ({"input_ids": [5, 6], "videos": [["a"]]}, {}, "'videos' is not empty"),
        ({"input_ids": [5.0]}, {}, r"'input_ids' is List\(Value\('float64'\)\), not a list of whole numbers"),
        ({"input_ids": "a"}, {}, "'input_ids' is .* not a list of whole numbers"),
        ({"input_ids": [5, 6], "labels": 1}, {}, "'labels' is .* not a list of whole numbers"),
        ({"input_ids": [5, 6], "labels": [True, False]}, {}, "'labels' is .* not a list of whole numbers"),
    ],
)
def test_columns_that_cannot_be_meant_are_one_line(row, mapping, told):
    with pytest.raises(InputError, match=told) as refused:
        prepared(Dataset.from_list([row]), mapping, tokenizer_of())
    assert "\n" not in str(refused.value)


def test_a_column_that_is_the_same_may_have_the_new_name():
    mapped = map_columns(Dataset.from_list([{"q": "a", "r": "b", "completion": "b"}]), ColumnMapping(**PAIR))
    assert list(mapped) == [{"prompt": "a\n", "completion": "b"}]


@pytest.mark.parametrize("shown", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_nothing(shown):
    tokenizer = tokenizer_of()
    for row, mapping in (({"q": "a", "r": "b"}, PAIR), ({"conversations": shared("hi", "ho")}, {})):
        dataset = Dataset.from_list([row])
        expected = prepared(dataset, mapping, tokenizer)[0].fingerprint
        assert prepared(dataset.with_format(shown), mapping, tokenizer)[0].fingerprint == expected


def test_a_transform_and_a_hidden_column_are_one_line():
    dataset = Dataset.from_list([{"q": "a", "r": "b"}])
    with pytest.raises(InputError, match=r"with_transform.*dataset.map first"):
        map_columns(dataset.with_transform(lambda batch: {"prompt": batch["q"]}), ColumnMapping(**PAIR))
    with pytest.raises(InputError, match=r"no column 'r'. It has: q"):
        map_columns(dataset.with_format(None, columns=["q"]), ColumnMapping(**PAIR))


def test_rows_of_a_json_file_may_differ_in_their_types(tmp_path):
    calls = [said("ho", tool_calls=[{"function": {"name": "f", "arguments": each}}]) for each in ({"a": 1}, {"b": "c"})]
    rows = [
        {"messages": [{"role": role, "content": "hi"}, call]}
        for role, call in zip(("user", "human"), calls, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    expected = [{"messages": [user("hi"), call]} for call in calls]
    assert list(map_columns(dataset, ColumnMapping())) == expected


TOOLS = [{"name": "f"}]
# lines of a file whose rows hold values of several kinds; what the usable rows say, and why others are skipped
MIXED: dict[str, tuple[list[dict], dict, list[str], dict[int, str]]] = {
    "tools": (
        [{"messages": talk("hi", "ho"), "tools": each} for each in (TOOLS, "", json.dumps(TOOLS), None, "null", "[{")],
        {},
        ['[[{"name": "f"}]]' + BOTH, BOTH] * 2 + [BOTH],
        {5: "'tools' is no JSON"},
    ),
    "messages": (
        [{"messages": each} for each in (talk("hi", "ho"), "hi", user("hi"), 3, None)],
        {},
        [BOTH],
        {1: "messages are text, not", 2: "messages are a dict, not", 3: "are a number, not", 4: "empty completion"},
    ),
    "more pairs of text": (
        [
            *({"prompt": each, "completion": "007"} for each in ("1.50", "[1]", 3, None)),
            {"prompt": [user("hi")], "completion": [said("ho")]},
            {"prompt": "true", "completion": [said("ho")]},
            {"prompt": "[]", "completion": {"a": 1}},
        ],
        {},
        ["1.50007<eos>", "[1]007<eos>"],
        {
            2: "one of prompt and completion is text",
            3: "the prompt is null",
            4: "are messages, and those of most rows text",
            5: "one of prompt and completion is text, the other is not",
            6: "one of prompt and completion is text, the other is not",
        },
    ),
    "more pairs of messages": (
        [
            {"prompt": "hi", "completion": "ho"},
            *({"prompt": [user("hi")], "completion": [said("ho")]} for _ in range(2)),
        ],
        {},
        [BOTH] * 2,
        {0: "are text, and those of most rows messages"},
    ),
    "text": (
        [{"text": each} for each in ("007", "[1]", ["a"], '"1.50"', {"a": 1}, "", 18, 1.5, None)],
        {},
        ["007<eos>", "[1]<eos>", '"1.50"<eos>', "18<eos>"],
        {
            2: "'text' holds a list, not text",
            4: "holds a dict, not text",
            5: "empty completion",
            7: "holds a number, not text",
            8: "empty completion",
        },
    ),
    "mapped": (
        [{"q": "hi", "r": each} for each in ("1.50", ["a"], 18, True, None, "null")],
        PAIR,
        ["hi\n1.50<eos>", "hi\n18<eos>", "hi\nnull<eos>"],
        {1: "'r' holds a list, not text", 3: "holds true or false, not text", 4: "empty completion"},
    ),
    "arguments of calls": (
        [
            {"messages": [{"role": "human", "content": each}, said("ho", tool_calls=[{"arguments": call}])]}
            for each, call in (("-0.7", {"a": -0.7}), ("hi", {"b": 42.72962913176735}))
        ],
        {},
        [
            plain(("user", "-0.7"), ("assistant", "ho")) + '[{"arguments": {"a": -0.7}}]',
            plain(("user", "hi"), ("assistant", "ho")) + '[{"arguments": {"b": 42.72962913176735}}]',
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_one_row_of_another_kind_ends_no_run(name, tmp_path, tiny_llama):
    rows, mapping, says, why = MIXED[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, tokenizer = load_rows(str(path)), tokenizer_of(TEMPLATE + CALLS)
    found, reasons, _ = prepared(dataset, mapping, tokenizer)
    assert text(found, tokenizer) == says
    assert sorted(reasons) == sorted(why)
    assert all(part in reasons[row] for row, part in why.items())

    mapped = map_columns(dataset.select(found.sample_ids), ColumnMapping(**mapping))
    trains = SFTTrainer(tiny_llama(), arguments(), train_dataset=mapped, processing_class=tokenizer)
    for column in ("input_ids", "labels"):
        assert list(trains.train_dataset[column]) == list(found.dataset[column])


# ---- what only the template knows


def test_a_row_that_the_template_refuses_has_its_reason():
    rows = [{"messages": each} for each in (GOOD, [*talk("a"), *talk("b", "c")], GOOD)]
    told = "SFTTrainer cannot prepare it: Roles must alternate"
    found, reasons, _ = prepared(Dataset.from_list(rows), {}, tokenizer_of(STRICT))
    assert reasons == {1: told}
    assert found.sample_ids.tolist() == [0, 2]
    with pytest.raises(InputError, match=rf"^1 of 3 rows .* Row 1: {told}.*drop_empty=True"):
        prepared(Dataset.from_list(rows), {}, tokenizer_of(STRICT), drop_empty=False)


def test_a_template_that_refuses_every_row_is_one_line():
    rows = Dataset.from_list([{"messages": GOOD, "system": "be"}] * 2)
    with pytest.raises(InputError, match=r"^TRL cannot prepare this dataset: Roles must alternate$"):
        prepared(rows, {}, tokenizer_of(STRICT))


def test_a_role_that_the_template_leaves_out_is_a_reason_and_one_that_it_renders_is_none():
    rows = Dataset.from_list([{"messages": GOOD}, {"messages": [{"role": "critic", "content": "bad"}, *GOOD]}])
    assert prepared(rows, {}, tokenizer_of(SILENT))[1].keys() == {1}
    assert "does not render the role 'critic'" in prepared(rows, {}, tokenizer_of(SILENT))[1][1]
    found, reasons, _ = prepared(rows, {}, tokenizer_of())
    assert reasons == {}
    assert text(found, tokenizer_of())[1].startswith("<|critic|>bad<|end|>")


@pytest.mark.parametrize("max_length", [None, 8])
def test_a_reason_blames_max_length_only_for_what_it_cuts_off(max_length):
    rows = [
        *({"messages": each} for each in (GOOD, [{"role": "system", "content": "be"}])),
        *({"messages": [user("very long " * 9), said("a")]} for _ in range(1)),
    ]
    _, reasons, _ = prepared(Dataset.from_list(rows), {}, tokenizer_of(SILENT), max_length=max_length)
    assert reasons == {1: "the chat template renders nothing of its messages"}
    pairs = [
        {"prompt": talk("very long " * 9), "completion": [said("a")]},
        {"prompt": talk("a"), "completion": [said("b")]},
    ]
    pairs += [{"prompt": talk("a"), "completion": [{"role": "tool", "content": "b"}]}]
    _, reasons, _ = prepared(Dataset.from_list(pairs), {}, tokenizer_of(SILENT), max_length=max_length)
    cut = {} if max_length is None else {0: "no token to learn within max_length 8"}
    assert reasons == {**cut, 2: "the chat template renders nothing to learn of its messages"}


@pytest.mark.parametrize(("row", "mapping"), [({"messages": GOOD}, {}), ({"q": "a", "r": "b"}, CHAT)])
def test_messages_without_a_template_are_one_line_with_what_to_do(row, mapping):
    with pytest.raises(InputError, match=r"no chat template.*chat_template_path"):
        prepared(Dataset.from_list([row]), mapping, tokenizer_of(None))


# ---- repeated rows


@pytest.mark.parametrize("mapping", [{}, CHAT, {"messages_column": "messages"}])
def test_the_same_question_with_other_tools_is_no_repeat(mapping):
    rows = [{"q": "hi", "r": each, "messages": talk("hi", each)} for each in "abc"]
    for row, tools in zip(rows, ("[]", '[{"name": "f"}]', "[]"), strict=True):
        row["tools"] = tools
    _, reasons = usable_rows(Dataset.from_list(rows), ColumnMapping(**mapping), arguments(), True, False)
    assert reasons == {2: "same prompt as row 0"}
    for row, style in zip(rows, "xyx", strict=True):
        row |= {"tools": "", "chat_template_kwargs": {"style": style}}
    _, reasons = usable_rows(Dataset.from_list(rows), ColumnMapping(**mapping), arguments(), True, False)
    assert reasons == {2: "same prompt as row 0"}


def test_a_repeat_names_the_first_row_by_its_position_among_all():
    rows = [{"messages": each} for each in ([None], GOOD, [None], GOOD)]
    _, reasons = usable_rows(Dataset.from_list(rows), ColumnMapping(), arguments(), True, True)
    assert reasons[3] == "same prompt as row 1"
    assert set(reasons) == {0, 2, 3}

"""Chat rows as people have them: each is read in its one meaning, or refused with a reason that says what to change."""

from __future__ import annotations

from typing import Any

import pytest

from resofilter_trainer.data.chat import (
    Learning,
    Unreadable,
    check_flags,
    forms_of,
    messages_of,
    repeats_first,
    role_changes,
    template_settings_of,
    tools_of,
    turns_of,
    with_system,
)

ASSISTANT = Learning(assistant_only=True)


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


TALK = [turn("user", "hi"), turn("assistant", "ho")]


@pytest.mark.parametrize("user", ["human", "Human", "user", "User ", "prompter"])
@pytest.mark.parametrize("assistant", ["gpt", "GPT", "bot", "chatgpt", "bing", "bard", "claude", "model", "assistant"])
@pytest.mark.parametrize(("role", "content"), [("from", "value"), ("role", "content")])
def test_roles_and_keys_with_one_meaning_are_trls(user, assistant, role, content):
    rows = [{role: user, content: "hi"}, {role: assistant, content: "ho"}]
    assert messages_of(rows) == TALK
    assert {new for _, new in role_changes(rows)} <= {"user", "assistant"}


def test_both_pairs_of_keys_in_one_dataset_are_null_where_they_are_not_used():
    ours = {"role": "user", "content": "hi", "from": None, "value": None}
    theirs = {"role": None, "content": None, "from": "gpt", "value": "ho"}
    assert messages_of([ours, theirs]) == TALK


def test_messages_in_trls_form_stay_as_they_are():
    call = turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}])
    for messages in (TALK, [turn("user", ""), call, turn("tool", "1"), turn("critic", "x", name="a")], []):
        assert messages_of(messages) == messages
        assert role_changes(messages) == set()


def test_one_part_of_text_is_that_text():
    assert messages_of([turn("user", [{"type": "text", "text": "hi"}]), TALK[1]]) == TALK


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([TALK[0], None], "message 1 is null"),
        (["hi"], "message 0 is text"),
        ("hi", "its messages are text, not a list"),
        ([turn("user", None), TALK[1]], r"message 0 \(user\) has no content"),
        ([{"content": "hi"}], "message 0 has no role. Its keys are content"),
        (
            [{"from": "narrator", "value": "hi"}],
            "message 0 has the role 'narrator', which has no single meaning. Rename",
        ),
        ([{"from": "function_call", "value": "{}"}], "'function_call', which has no single meaning.*tool_calls"),
        ([{"role": "user", "from": "gpt", "content": "hi"}], "different values in role and from"),
        ([turn("user", [{"type": "image"}, {"type": "text", "text": "a"}])], "message 0 has the parts: image, text"),
        ([turn("user", [])], "message 0 has the parts: none"),
        ([turn("user", 7)], "content of message 0 is a number, not text"),  # was it 7 or 007?
        ([turn("user", True)], "content of message 0 is true or false, not text"),
        ([turn("user", {"a": 1})], "content of message 0 is a dict, not text"),
    ],
)
def test_messages_without_a_single_meaning_are_refused_by_number(messages, told):
    with pytest.raises(Unreadable, match=told):
        messages_of(messages)


def test_only_the_last_message_of_a_row_may_be_without_content():
    assert messages_of([TALK[0], turn("assistant", None)])[1]["content"] is None
    with pytest.raises(Unreadable, match="message 1"):
        messages_of([TALK[0], turn("assistant", None)], answered=True)


# ---- columns beside the messages


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_an_empty_system_says_nothing(empty):
    assert with_system(TALK, empty, "system") is TALK


def test_a_system_becomes_the_first_message_unless_it_is_there():
    said = [turn("system", "be kind"), *TALK]
    assert with_system(TALK, "be kind", "system") == said
    assert with_system(said, " be kind\n", "system") is said
    with pytest.raises(Unreadable, match="column 'system' differs from its system message"):
        with_system(said, "be brief", "system")
    with pytest.raises(Unreadable, match="column 'system' holds a list, not text"):
        with_system(TALK, ["be kind"], "system")


def test_history_of_pairs_or_of_messages_is_earlier_turns():
    assert turns_of([["hi", "ho"]] * 2) == TALK * 2
    assert turns_of([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]) == TALK
    assert turns_of([]) == turns_of(None) == []


@pytest.mark.parametrize(
    "history", ['"hi"', ["hi", "ho"], '["hi", "ho"]', [["hi"]], [["hi", None]], [["a", "b", "c"]], [[1, "a"]]]
)
def test_another_history_is_refused(history):
    with pytest.raises(Unreadable, match=r"'history' is not a list of \[question, answer\] pairs"):
        turns_of(history)


TOOLS = [{"name": "f"}]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (None, None),
        ("", None),
        (" ", None),
        (TOOLS, TOOLS),
        ('[{"name": "f"}]', '[{"name": "f"}]'),
        ([], []),
        ("[]", "[]"),
    ],
)
def test_tools_are_trls_or_none(value, read):
    assert tools_of(value) == read


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('[{"name"', "'tools' is no JSON"),
        ("a hammer", "'tools' is no JSON"),
        ('{"name": "f"}', "'tools' holds a dict, not a list of tools"),
        ({"name": "f"}, "'tools' holds a dict"),
        ("3", "'tools' holds a number"),
        (["f"], "'tools' holds a list, not a list of tools"),
    ],
)
def test_other_tools_are_refused(value, told):
    with pytest.raises(Unreadable, match=told):
        tools_of(value)


def test_template_settings_are_a_dict():
    assert template_settings_of(None) == template_settings_of("") == template_settings_of("{}") == {}
    assert template_settings_of('{"a": 1}') == template_settings_of({"a": 1}) == {"a": 1}
    for value in ("{", "[1]", 3):
        with pytest.raises(Unreadable, match="chat_template_kwargs"):
            template_settings_of(value)


@pytest.mark.parametrize(
    ("prompt", "repeats"),
    [("hi", True), (" hi\n", True), (None, True), ("", True), ("ho", False), (TALK[:1], True), (TALK[1:], False)],
)
def test_a_prompt_beside_messages_repeats_them_or_not(prompt, repeats):
    assert repeats_first(prompt, [turn("system", "s"), *TALK] if isinstance(prompt, str | None) else TALK) is repeats


# ---- flags


def talk(*flags: Any, name: str = "weight") -> list[dict[str, Any]]:
    """A message for each flag, of user and assistant in turn."""
    return [turn(("user", "assistant")[number % 2], "x", **{name: flag}) for number, flag in enumerate(flags)]


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(("yes", "no"), [(1, 0), (True, False), (1.0, 0.0)])
def test_flags_say_what_the_settings_do_or_make_a_pair(name, yes, no):
    for learning in (Learning(), ASSISTANT):
        assert forms_of(talk(None, None, name=name), learning) == ("messages",)
        assert forms_of(talk(yes, yes, yes, yes, name=name), learning) == ("messages",)
        assert forms_of(talk(None, no, None, yes, name=name), learning) == ("pair",)
        assert forms_of(talk(no, no, no, yes, name=name), learning) == ("pair",)
    assert forms_of(talk(no, yes, name=name), Learning()) == ("pair",)
    assert forms_of(talk(no, yes, name=name), ASSISTANT) == ("messages", "pair")
    assert forms_of(talk(no, yes, no, yes, name=name), ASSISTANT) == ("messages",)


@pytest.mark.parametrize(
    ("flags", "learning", "told"),
    [
        ((0, 1, 0, 1), Learning(), "messages 1, 3 of 4 are learnt. Pass assistant_only_loss=True"),
        ((0, 1), Learning(completion_only=False), "messages 1 of 2 are learnt"),
        ((None, 1, None, 0), ASSISTANT, "messages 1 of 4 are learnt. Remove the flags"),
        ((1, 0), Learning(), "messages 0 of 2 are learnt"),
        ((None, 0), Learning(), "no message is learnt"),
        ((None, 0.5), Learning(), "message 1 has weight=0.5: a trainer learns a message or not"),
        ((None, "yes"), Learning(), "message 1 has weight='yes'"),
        ((2, None), Learning(), "message 0 has weight=2"),
    ],
)
def test_flags_that_no_setting_follows_are_refused(flags, learning, told):
    with pytest.raises(Unreadable, match=told):
        forms_of(talk(*flags), learning)


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(Unreadable, match="contradict each other: weight, train"):
        forms_of([TALK[0], turn("assistant", "x", weight=1, train=False)], Learning())


def test_without_an_assistant_there_is_nothing_to_learn_of_assistants():
    with pytest.raises(Unreadable, match="no assistant message"):
        forms_of(TALK[:1], ASSISTANT)
    assert forms_of(TALK[:1], Learning()) == ("messages",)
    with pytest.raises(Unreadable, match="no assistant message"):
        check_flags(TALK[:1], TALK[:1], ASSISTANT)


def test_flags_of_a_pair_must_say_what_is_learnt_of_pairs():
    asked, said = talk(0), [turn("assistant", "x", weight=1)]
    check_flags(asked, said, Learning())
    check_flags(asked, said, ASSISTANT)
    for prompt, completion, learning in (
        (asked, said, Learning(completion_only=False)),
        (talk(1), [turn("assistant", "x", weight=0)], Learning()),
    ):
        with pytest.raises(Unreadable, match="its flags say"):
            check_flags(prompt, completion, learning)

"""Small datasets of every kind that SFTTrainer takes, and of every kind that it does not.

The kinds are those of TRL's own test data: language modeling and prompt-completion, as text or as messages, with tools,
with arguments for the chat template, in the ShareGPT form, and as tokens. SFT holds those that SFTTrainer trains on,
OTHERS those that are made for another trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from helpers.tokenizers import make_tokenizer

Row = dict[str, Any]

FACTS = (
    ("Which bird swims but cannot fly?", "The penguin."),
    ("What is 1 + 2 ?", "answer: 3"),
    ("Name a colour.", "Teal, between green and blue."),
    ("Is ice lighter than water?", "Yes, so it floats."),
    ("Who wrote it?", "Nobody knows."),
    ("What is 12 * 12 ?", "144, a gross."),
    ("How many legs has a spider?", "Eight."),
    ("Say the quick brown fox.", "the quick brown fox jumps over the lazy dog"),
    ("What melts?", "Snow, wax and chocolate."),
    ("A word for a small river?", "Brook."),
    ("What is 7 - 9 ?", "Minus two, which is below zero."),
    ("Where does the sun set?", "West."),
    ("Spell cat.", "c a t"),
    ("Which metal is liquid?", "Mercury, at room temperature."),
    ("Count to four.", "one two three four"),
    ("Why is the sea salty?", "Rivers carry salt into it."),
    ("Opposite of up?", "Down."),
)
THE_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "sum", "parameters": {"type": "object", "required": ["a"]}},
}
TEMPLATE = (
    "{% if tools %}{{ '<|user|>tools' + tools | map(attribute='function.name') | join(',') + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if thinking %}{{ 'think ' }}{% endif %}{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + ' call' }}{% endfor %}"
    "{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def zen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template shows tools, tool calls and the argument `thinking`."""
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def say(role: str, content: str | None, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def turns(question: str, answer: str) -> list[Row]:
    return [say("user", question), say("assistant", answer)]


def several_turns(number: int, question: str, answer: str) -> list[Row]:
    """One or two questions with their answers."""
    first = turns(*FACTS[number - 1]) if number % 2 else []
    return [*first, *turns(question, answer)]


def calling(number: int, question: str, answer: str) -> list[Row]:
    """Every third answer is found by calling a tool."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}
    called = [say("assistant", "", tool_calls=[call]), say("tool", str(number))] if number % 3 == 0 else []
    return [say("user", question), *called, say("assistant", answer)]


def from_value(messages: list[Row]) -> list[Row]:
    return [{"from": each["role"], "value": each["content"]} for each in messages]


_TOKENIZER = zen_tokenizer()


def tokens(text: str) -> list[int]:
    return list(_TOKENIZER(text).input_ids)


def masked(name: str, question: str, answer: str) -> Row:
    """Tokens, and a mask of those that belong to the answer."""
    prompt, completion = tokens(question + "\n"), tokens(answer)
    return {"input_ids": prompt + completion, name: [0] * len(prompt) + [1] * len(completion)}


def labelled(question: str, answer: str) -> Row:
    prompt, completion = tokens(question + "\n"), tokens(answer)
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


Make = Callable[[int, str, str], Row]

SFT: dict[str, Make] = {
    # language modeling
    "text": lambda i, q, a: {"text": f"{q}\n{a}"},
    "messages": lambda i, q, a: {"messages": several_turns(i, q, a)},
    "messages with a system message": lambda i, q, a: {"messages": [say("system", "Be brief."), *turns(q, a)]},
    "messages and tools": lambda i, q, a: {"messages": calling(i, q, a), "tools": [THE_TOOL] * (i % 3)},
    "messages and tools as JSON": lambda i, q, a: {"messages": turns(q, a), "tools": json.dumps([THE_TOOL] * (i % 3))},
    "messages and template arguments": lambda i, q, a: {
        "messages": turns(q, a),
        "chat_template_kwargs": {"thinking": i % 2 == 0},
    },
    "ShareGPT": lambda i, q, a: {"conversations": from_value(several_turns(i, q, a))},
    # prompt and completion
    "prompt-completion": lambda i, q, a: {"prompt": q + "\n", "completion": a},
    "conversational prompt-completion": lambda i, q, a: {
        "prompt": several_turns(i, q, a)[:-1],
        "completion": [say("assistant", a)],
    },
    "prompt-completion and tools": lambda i, q, a: {
        "prompt": [say("user", q)],
        "completion": calling(i, q, a)[1:],
        "tools": [THE_TOOL] * (i % 2),
    },
    "prompt-completion and template arguments": lambda i, q, a: {
        "prompt": [say("user", q)],
        "completion": [say("assistant", a)],
        "chat_template_kwargs": {"thinking": i % 3 == 0},
    },
    # tokens
    "input_ids": lambda i, q, a: {"input_ids": tokens(f"{q}\n{a}")},
    "input_ids and labels": lambda i, q, a: labelled(q, a),
    "input_ids and completion_mask": lambda i, q, a: masked("completion_mask", q, a),
    "input_ids and assistant_masks": lambda i, q, a: masked("assistant_masks", q, a),
    # made for another trainer, and trained on as prompt and completion all the same
    "unpaired preference": lambda i, q, a: {"prompt": q + "\n", "completion": a, "label": i % 2 == 0},
}

OTHERS: dict[str, Make] = {
    "prompt only": lambda i, q, a: {"prompt": q},
    "conversational prompt only": lambda i, q, a: {"prompt": [say("user", q)]},
    "preference": lambda i, q, a: {"prompt": q, "chosen": a, "rejected": a[::-1]},
    "conversational preference": lambda i, q, a: {
        "prompt": [say("user", q)],
        "chosen": [say("assistant", a)],
        "rejected": [say("assistant", a[::-1])],
    },
    "implicit preference": lambda i, q, a: {"chosen": f"{q} {a}", "rejected": f"{q} {a[::-1]}"},
    "conversational implicit preference": lambda i, q, a: {"chosen": turns(q, a), "rejected": turns(q, a[::-1])},
    "stepwise supervision": lambda i, q, a: {"prompt": q, "completions": a.split(), "labels": [True] * len(a.split())},
}

RAW: dict[str, Make] = {  # that an argument of SFTTrainer makes trainable
    "text under another name": lambda i, q, a: {"body": f"{q}\n{a}"},
    "question and answer": lambda i, q, a: {"question": q, "answer": a},
}


def zen(kind: str, count: int = len(FACTS)) -> Dataset:
    """Rows of a kind, each with its `number`; no two have the same tokens."""
    make = {**SFT, **RAW, **OTHERS}[kind]
    return Dataset.from_list([{**make(i, *fact), "number": i} for i, fact in enumerate(FACTS[:count])])

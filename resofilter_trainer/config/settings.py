"""The settings a user can choose, as plain dataclasses. Knows nothing of data, models or torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .checks import at_most_one, check_kind, number, one_of, share, whole_number, with_known_keywords
from .errors import InputError

UpdateName = Literal["adamw", "sgd", "optimizer"]  # model.updates has a record of each
Norm = Literal["mean_abs", "l2"]
Ranking = Literal["global", "sample"]
Precision = Literal["auto", "float32", "bfloat16"]
FILE_FORMATS = {  # dataset files, by suffix
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".tsv": "csv",
}
OPTIMIZER: UpdateName = "optimizer"
SATURATING: frozenset[UpdateName] = frozenset({"adamw"})  # for what needs no torch; bound to the records
SELF = "self"
RESONANCE = "resonance"
CLEANING_MODES = ("fixed", "self-evolving", "rho")
WarmupMethod = Literal["full", "lora"]
WARMUP_LR: dict[WarmupMethod, float] = {"full": 1e-4, "lora": 2e-4}


@with_known_keywords
@dataclass(frozen=True)
class ResonanceConfig:
    """How to measure a sample's resonance. The defaults are those of ResoFilter's released code (arXiv 2412.14809).

    Attributes:
        n_layers: the number of last decoder layers to measure; the score is the mean over them.
        update: the step that is measured: the first of a fresh `"adamw"`; `"sgd"`, the plain step `lr * g` without
            momentum or weight decay; or `"optimizer"`, what a training run's own optimizer did (`ResonanceCallback`).
        norm: the size of a matrix of changes: `"mean_abs"`, the mean absolute change, or `"l2"`, the Frobenius norm.
        lr: the learning rate of that step. It scales every score and changes no ranking.
        eps: AdamW's eps. The score saturates for gradients above it; a larger eps spreads the scores.
        weight_decay: AdamW's decoupled weight decay.
        up_projection: a regex over dotted module names, for unknown model families.

    Raises:
        InputError: a value is out of range or unknown.
    """

    n_layers: int = 3
    update: UpdateName = "adamw"
    norm: Norm = "mean_abs"
    lr: float = 1e-5
    eps: float = 1e-8
    weight_decay: float = 0.01
    up_projection: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_layers", whole_number("n_layers", self.n_layers, least=1))
        one_of("update", self.update, get_args(UpdateName))
        one_of("norm", self.norm, get_args(Norm))
        _check_text("up_projection", self.up_projection, "a regex over module names")
        for name in ("lr", "eps"):
            object.__setattr__(self, name, number(name, getattr(self, name), above=0))
        object.__setattr__(self, "weight_decay", number("weight_decay", self.weight_decay, least=0))

    def to_json(self) -> dict[str, Any]:
        """The settings by name, for provenance; lr, eps and weight_decay are None for a run's own optimizer."""
        own = dict.fromkeys(("lr", "eps", "weight_decay")) if self.update == OPTIMIZER else {}
        return {**asdict(self), **own}


@with_known_keywords
@dataclass(frozen=True)
class ColumnMapping:
    """The columns of the user's dataset that hold the prompt and the completion, the messages, or the text.

    By default the dataset is used as it is: with the column names that TRL expects (`prompt` and `completion`,
    `messages`, `text`, or `input_ids`).

    Attributes:
        prompt_column: the prompt. Several columns (instruction, input) are joined by a blank line, without empty ones.
        completion_column: the answer that the model learns.
        messages_column: a list of `{"role", "content"}` messages.
        text_column: plain text, every token of which is learnt.
        separator: the text between prompt and completion if the prompt does not end in white space.
        conversational: whether to turn the prompt into a user message and the completion into an assistant message, so
            that the tokenizer's chat template is applied.

    Raises:
        InputError: one of `prompt_column` and `completion_column` is missing, the settings exclude each other or name a
            column twice, or one is no name.
    """

    prompt_column: str | Sequence[str] | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    text_column: str | None = None
    separator: str = "\n"
    conversational: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_column", "completion_column", "messages_column", "text_column"):
            what = "the name of a column" + (", or a list of names" if name == "prompt_column" else "")
            _check_text(name, getattr(self, name), what)
        if not isinstance(self.separator, str):
            raise InputError(f"separator must be text, got {self.separator!r}.")
        one_of("conversational", self.conversational, (True, False))
        if (self.prompt_column is None) != (self.completion_column is None):
            raise InputError("prompt_column and completion_column go together: pass both, or neither.")
        at_most_one(
            prompt_column=self.prompt_column, messages_column=self.messages_column, text_column=self.text_column
        )
        twice = next((each for each in self.columns if self.columns.count(each) > 1), None)
        if twice is not None:
            raise InputError(f"Column '{twice}' is named twice. Prompt and completion are different columns.")

    @property
    def prompt_columns(self) -> list[str]:
        """The prompt's columns, in the order in which they are joined; empty if no prompt is mapped."""
        if self.prompt_column is None:
            return []
        return [self.prompt_column] if isinstance(self.prompt_column, str) else list(self.prompt_column)

    @property
    def columns(self) -> list[str]:
        """Every column that the mapping names."""
        others = (self.completion_column, self.messages_column, self.text_column)
        return self.prompt_columns + [column for column in others if column is not None]


def _check_text(name: str, value: Any, what: str) -> None:
    """Raise InputError unless a setting is None, text that is not empty or, where `what` says so, a sequence of it."""
    listed = "list" in what and isinstance(value, Sequence) and not isinstance(value, str)
    texts = list(value) if listed else [] if value is None else [value]
    if (listed and not texts) or not all(isinstance(each, str) and each for each in texts):
        raise InputError(f"{name} must be {what}, got {value!r}.")


@with_known_keywords
@dataclass(frozen=True)
class TokenCleaning:
    """How token cleaning chooses the tokens to learn; it masks the others. Defaults as in arXiv 2502.01968.

    A token's score is its loss under the base model minus its loss under the reference model. The tokens with the
    highest scores are kept.

    Attributes:
        keep: the share of the learnt tokens to keep.
        reference: the name or folder of a model or LoRA adapter that was trained on good data, which cleans all rows
            before the first step (fixed-model cleaning); or `"self"`, the model in training (self-evolving cleaning).
        ranking: `"global"` ranks tokens over all rows that are cleaned together, `"sample"` within each row, as RHO.
        parts: the number of stages of an epoch, for `"self"`. The first stage of the first epoch is learnt whole; every
            other one is cleaned by the latest weights when it begins.
        group_by: a column of the dataset, such as its source. The kept share of each group is reported.
        tokens_per_batch: the number of tokens, padding included, in a batch whose losses are measured.

    Raises:
        InputError: a value is out of range or unknown.
    """

    keep: float = 0.6
    reference: str = SELF
    ranking: Ranking = "global"
    parts: int = 5
    group_by: str | None = None
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", share("keep", self.keep, "tokens"))
        one_of("ranking", self.ranking, get_args(Ranking))
        for name, least in (("parts", 2), ("tokens_per_batch", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        _check_text("group_by", self.group_by, "the name of a column")
        if not isinstance(self.reference, str) or not self.reference:
            raise InputError(f"reference must be a name, a folder or 'self', got {self.reference!r}.")


def cleaning_of_mode(mode: str, reference: str | None, ranking: str | None, **settings: Any) -> TokenCleaning:
    """The settings of a mode, as commands and recipes offer it.

    Args:
        mode: one of `CLEANING_MODES`.
        reference: a model or an adapter; None for self-evolving cleaning, or if the reference is still to be trained.
        ranking: the ranking, by default the one of the mode.
        **settings: the other fields of `TokenCleaning`.

    Raises:
        InputError: the mode is unknown, or does not go with the reference or the ranking.
    """
    one_of("mode", mode, CLEANING_MODES)
    if mode == "rho" and ranking == "global":
        raise InputError("mode='rho' ranks within each sample: leave ranking= out, or use mode='fixed'.")
    if mode == "self-evolving" and reference is not None:
        raise InputError("mode='self-evolving' trains its own reference: leave reference= out, or use mode='fixed'.")
    chosen: Any = ranking or ("sample" if mode == "rho" else "global")
    return TokenCleaning(reference=reference or SELF, ranking=chosen, **settings)


@with_known_keywords
@dataclass(frozen=True)
class Warmup:
    """A short training before a pass: a copy of the model is tuned on some rows, and measures all rows.

    The learning rate falls linearly to 0, with AdamW and without weight decay.

    Attributes:
        rows: the number of rows to tune on, drawn at random; None for all.
        method: `"full"` tunes all weights; `"lora"` a LoRA adapter on all linear layers, which is merged afterwards. A
            quantised model needs `"lora"`, and so does a `PeftModel`, whose own adapter is then tuned.
        lr: the first step's learning rate; by default 1e-4, and 2e-4 for LoRA.
        epochs: how often each row is learnt.
        batch_size: the rows of an optimizer step, in all processes together. `args.per_device_train_batch_size` is the
            most that a process learns at a time.
        lora_rank: the rank of a new adapter; its alpha is twice that.
        seed: the seed that draws the rows, their order, and a new adapter.
        cache: a folder for the tuned weights, which passes of the same model, rows and settings share; by default
            `warmup` in the folder of the scores.

    Raises:
        InputError: a value is out of range or unknown.
    """

    rows: int | None = 640
    method: WarmupMethod = "full"
    lr: float | None = None
    epochs: int = 1
    batch_size: int = 8
    lora_rank: int = 16
    seed: int = 0
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        one_of("The warm-up's method", self.method, get_args(WarmupMethod))
        for name, least in (("rows", 1), ("epochs", 1), ("batch_size", 1), ("lora_rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if name != "rows" or value is not None:
                object.__setattr__(self, name, whole_number(f"The warm-up's {name}", value, least))
        lr = WARMUP_LR[self.method] if self.lr is None else self.lr
        object.__setattr__(self, "lr", number("The warm-up's lr", lr, above=0))
        check_kind("The warm-up's cache", self.cache, (str, os.PathLike, type(None)), "a folder")

    def to_json(self) -> dict[str, Any]:
        """What the tuned weights depend on, by name; the rank of a new adapter only where there is one."""
        without = {"cache"} if self.method == "lora" else {"cache", "lora_rank"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in without}


def warmup_settings(warmup: int | Warmup | None, from_dataset: bool = False) -> Warmup | None:
    """The settings of a warm-up, of which the number of rows is short for the others' defaults; None for none.

    Args:
        warmup: the argument of that name.
        from_dataset: whether there is a dataset to tune on, all of whose rows are taken by default.
    """
    if warmup is None:
        return Warmup(rows=None) if from_dataset else None
    return warmup if isinstance(warmup, Warmup) else Warmup(rows=whole_number("warmup", warmup, least=1))

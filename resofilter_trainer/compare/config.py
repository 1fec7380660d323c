"""What a comparison compares, as a person writes it in YAML. Knows nothing of data, models or torch."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import InputError, one_of
from ..io.files import read_yaml
from ..selecting.results import FULL, RANDOM

DEMO = "demo"  # the model and the problems that ship with the package
OF_OWN_ROWS = (
    *("dataset_config", "split", "prompt_column", "completion_column", "wrong_column"),
    *("test_dataset", "test_split", "validation_dataset", "validation_split"),
)
SEEDS = 1 << 32  # so many there are
PLAIN: dict[str, Any] = {  # by annotation
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "int | None": ((int, type(None)), "a whole number"),
    "str | None": ((str, type(None)), "text"),
    "bool": (bool, "true or false"),
}


@dataclass(frozen=True)
class SelectorConfig:
    """One line of the table.

    Attributes:
        method: one of `selectors.METHODS`.
        name: in the table; the method by default.
        score_column: for the method `column`: the user's own scores, of which the smallest go.
        drop: for the method `column`, which end goes instead.
        settings: for the method `less`, fields of `LessConfig`.
        score_model: scores instead of the model that is trained (transfer).
    """

    method: str
    name: str = ""
    score_column: str | None = None
    drop: str = "smallest"
    settings: Mapping[str, Any] = field(default_factory=dict)
    score_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("method", "name", "drop", "score_column", "score_model"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name.startswith("score_")):
                raise InputError(f"A selector's {name} is text, got {value!r}.")
        if not isinstance(self.settings, Mapping):
            raise InputError(f"A selector's settings are a mapping, got {self.settings!r}.")
        by = "" if self.score_model is None else f" by {slug(self.score_model)}"
        object.__setattr__(self, "name", self.name or (self.score_column or self.method) + by)
        one_of("drop", self.drop, ("largest", "smallest"))
        if self.drop != "smallest" and self.method != "column":
            raise InputError(f"'{self.method}' knows itself which end goes: drop is for a score_column.")
        for baseline in (FULL, RANDOM):  # which the table compares the others with, by their names
            if (self.name == baseline) != (self.method == baseline):
                raise InputError(f"'{baseline}' is the name of the method '{baseline}', and of nothing else.")
        if (self.method == "column") != (self.score_column is not None):
            raise InputError("A selector with score_column has the method 'column', and the other way round.")

    @classmethod
    def of(cls, entry: Any) -> SelectorConfig:
        """From a line of YAML: a name, or a mapping. Raises InputError for anything else."""
        if isinstance(entry, str):
            return cls(entry)
        if isinstance(entry, Mapping) and "score_column" in entry:
            entry = {"method": "column", **entry}
        if not isinstance(entry, Mapping) or "method" not in entry:
            raise InputError(f"A selector is a name, or a mapping with 'method', got {entry!r}.")
        _check_names("a selector", entry, cls)
        if isinstance(entry.get("settings"), Mapping):
            entry = {**entry, "settings": _with_numbers(entry["settings"])}
        return cls(**entry)


@dataclass(frozen=True)
class DemoProblems:
    """The demo's problems, of which every seed makes its own: rows, how many of them wrong, and as many to test."""

    rows: int = 2000
    wrong_share: float = 0.4
    held_out: int = 400


@dataclass(frozen=True)
class ComparisonConfig:
    """Which selectors, on which data, how often.

    Attributes:
        selectors: names, or mappings with `method` and `name`.
        model: what is trained; a name, a folder, or `demo`; or several, of each of which everything is trained.
        dataset, dataset_config, split: what is selected from; a name, a file, a folder, or `demo`.
        prompt_column, completion_column: its columns, and the test rows'.
        wrong_column: a column of the rows that says which of them are wrong, where that is known.
        test_dataset, test_split: what the trained models answer, by exact match of the number after `####` or after
            "The answer is"; the same dataset by default.
        tasks: tasks or groups of lm-evaluation-harness instead, of which the metric is the mean.
        task_folder: holds task files of one's own.
        task_limit: how many documents of each task; all by default.
        unsafe_code: whether tasks may run the code that a model writes, as HumanEval does, on this machine.
        demo: the problems, where `dataset` is `demo`.
        keep: shares of the rows that stay.
        seeds: of each of which every selector is trained once.
        score_model: scores instead of the model that is trained, for every selector that names none itself.
        proxy_model: the small model of superfiltering.
        reference_model: what tokens are cleaned against; the model tuned on the first fifth of the rows by default.
        equal_flops: whether everything is trained once more, for as long as selecting and training together cost what
            training on all rows does.
        validation_dataset, validation_split, validation_rows: what LESS and Nuggets select for: the first so many rows.
        max_new_tokens: where an answer is cut off.
        training: fields of SFTConfig.
        output: a folder for everything.
    """

    selectors: Sequence[SelectorConfig]
    model: Sequence[str] = (DEMO,)
    dataset: str = DEMO
    dataset_config: str | None = None
    split: str = "train"
    prompt_column: str | Sequence[str] = "prompt"
    completion_column: str = "completion"
    wrong_column: str | None = None
    test_dataset: str | None = None
    test_split: str = "test"
    tasks: Sequence[str] = ()
    task_folder: str | None = None
    task_limit: int | None = None
    unsafe_code: bool = False
    demo: DemoProblems = field(default_factory=DemoProblems)
    keep: Sequence[float] = (0.5,)
    seeds: Sequence[int] = (0, 1, 2)
    score_model: str | None = None
    proxy_model: str | None = None
    reference_model: str | None = None
    equal_flops: bool = False
    validation_dataset: str | None = None
    validation_split: str = "validation"
    validation_rows: int = 16
    max_new_tokens: int = 256
    training: Mapping[str, Any] = field(default_factory=dict)
    output: str = "comparison"

    def __post_init__(self) -> None:
        for name in ("model", "tasks"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for each in dataclasses.fields(self):
            value, (kinds, words) = getattr(self, each.name), PLAIN.get(str(each.type), (object, ""))
            if words and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
                raise InputError(f"{each.name} is {words}, got {value!r}.")
        for what in ("max_new_tokens", "validation_rows", "task_limit"):
            number = getattr(self, what)
            if number is not None and number < 1:
                raise InputError(f"{what} must be a whole number of at least 1, got {number!r}.")
        for name in ("seed", "output_dir"):
            if name in self.training:
                raise InputError(
                    f"training has no {name}: that is the comparison's ({'seeds' if name == 'seed' else 'output'})."
                )
        self._check_rows()
        self._check_selectors()
        self._check_lists()
        self._check_models()

    def _check_rows(self) -> None:
        usual = {each.name: each.default for each in dataclasses.fields(self)}
        changed = [name for name in OF_OWN_ROWS if getattr(self, name) != usual[name]]
        if self.dataset == DEMO and changed:
            raise InputError(f"{changed[0]} is of rows of your own, and dataset is '{DEMO}': name those rows.")

    def _check_selectors(self) -> None:
        names = [each.name for each in self.selectors]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names:
            raise InputError("selectors is empty: name some.")
        if twice:
            raise InputError(f"Two selectors are called '{twice[0]}'. Give one of them another name.")
        for name in names:
            if "/" in name or name.startswith("."):
                raise InputError(f"'{name}' names a folder, too: leave slashes and a leading dot out.")
        if self.equal_flops and FULL not in names:
            raise InputError("equal_flops: the budget is what training on all rows costs: add the selector 'full'.")

    def _check_lists(self) -> None:
        for share in self.keep:
            if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
                raise InputError(f"keep lists shares that stay, above 0 and at most 1, got {share!r}.")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < SEEDS:
                raise InputError(f"seeds lists whole numbers of at least 0 and below {SEEDS}, got {seed!r}.")
        for name in ("keep", "seeds", "model"):
            listed = list(getattr(self, name))
            shown = {f"{each:g}" if name == "keep" else slug(str(each)) for each in listed}
            if not listed or len(shown) != len(listed):
                raise InputError(f"{name} lists different ones, at least one, got {listed}.")
        columns = [self.prompt_column] if isinstance(self.prompt_column, str) else self.prompt_column
        for name, names, least in (("prompt_column", columns, 1), ("tasks", self.tasks, 0)):
            texts = isinstance(names, Sequence) and all(isinstance(each, str) for each in names)
            if not texts or len(names) < least or len(set(names)) < len(names):
                raise InputError(f"{name} is a name, or a list of different names, got {names!r}.")
        if (self.task_folder or self.task_limit or self.unsafe_code) and not self.tasks:
            raise InputError("task_folder, task_limit and unsafe_code are for tasks: name some.")

    def _check_models(self) -> None:
        for model in self.model:
            if not isinstance(model, str):
                raise InputError(f"model is a name or a folder, or several, got {model!r}.")
        others = [self.score_model, self.proxy_model, *(each.score_model for each in self.selectors)]
        folders: dict[str, str] = {}
        for model in (*self.model, *(each for each in others if each is not None)):
            if not slug(model) or folders.setdefault(slug(model), model) != model:
                raise InputError(
                    f"The model '{model}' would lie in the folder '{slug(model)}'"
                    f"{f', as {folders[slug(model)]!r}' if slug(model) else ''}: name it by another path."
                )

    @classmethod
    def load(cls, path: str | Path) -> ComparisonConfig:
        """From a YAML file. Raises InputError for what cannot be read or is not known."""
        values = read_yaml(path, f"'{path}'")
        if not isinstance(values, Mapping):
            raise InputError(f"'{path}' must hold a mapping, 'name: value' on each line.")
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ComparisonConfig:
        """From plain values, as YAML has them."""
        _check_names("the comparison", values, cls)
        found = dict(values)
        if isinstance(found.get("seeds"), int):
            raise InputError(f"seeds is a list: [0, 1, 2] for three; got {found['seeds']}.")
        for name in ("selectors", "keep", "seeds", "model", "tasks"):
            if name in found and not isinstance(found[name], Sequence | str):
                found[name] = [found[name]]
            if isinstance(found.get(name), str):
                found[name] = [found[name]]
        if "selectors" not in found:
            raise InputError("The comparison names no selectors.")
        found["selectors"] = tuple(SelectorConfig.of(each) for each in found["selectors"])
        for name in ("demo", "training"):
            if name in found and not isinstance(found[name], Mapping):
                raise InputError(f"{name} is a mapping, got {found[name]!r}.")
        if "training" in found:
            found["training"] = _with_numbers(found["training"])
        if "demo" in found:
            _check_names("demo", found["demo"], DemoProblems)
            for name, value in found["demo"].items():
                kind, least = (numbers.Real, 0) if name == "wrong_share" else (int, 1)
                if isinstance(value, bool) or not isinstance(value, kind) or value < least:
                    raise InputError(f"demo's {name} is a number of at least {least}, got {value!r}.")
            found["demo"] = DemoProblems(**found["demo"])
        return cls(**found)


def slug(name: str) -> str:
    """A model's name as a part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def _with_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """With numbers such as 2e-5, which YAML 1.1 takes for text."""
    return {
        name: float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value
        for name, value in values.items()
    }


def _check_names(what: str, values: Mapping[str, Any], kind: type) -> None:
    known = [each.name for each in dataclasses.fields(kind)]
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise InputError(f"Of {what}, '{unknown[0]}' is not known. Known are: {', '.join(known)}.")

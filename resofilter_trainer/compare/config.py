"""The settings of a comparison, as they are written in YAML. Knows nothing of data, models or torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import InputError, number, one_of, share, together, whole_number
from ..io.files import read_yaml
from ..selecting.results import FULL, RANDOM
from .recommended import PROBE, SIGNAL, recommended_selector

DEMO = "demo"  # the model and the problems that come with the package
DYNAMICS = "dynamics"  # the method that selects by how rows are learnt
TOKEN_RULE = "token_rule"  # the method that selects or weighs tokens by a rule
COLUMN = "column"  # the method that selects by a column of the user's dataset
NOT_FOR_DEMO = (
    *("dataset_config", "split", "prompt_column", "completion_column", "wrong_column"),
    *("test_dataset", "test_split", "validation_dataset", "validation_split", "loss_dataset", "loss_split"),
)
OF_LOSS = ("loss_dataset", "loss_split")
LARGEST_SEED = (1 << 32) - 1
PLAIN: dict[str, Any] = {  # by annotation
    "str": (str, "text"),
    "str | None": ((str, type(None)), "text"),
    "bool": (bool, "true or false"),
}


@dataclass(frozen=True)
class SelectorConfig:
    """A selector: a method with its settings.

    Attributes:
        method: the name of the method, one of `methods.METHODS`.
        name: the selector's name in the table; the method's name by default.
        score_column: for the method `column`, the column with the user's own scores. Rows with the smallest scores
            are dropped.
        drop: for the method `column`, the end to drop, `"smallest"` or `"largest"`.
        settings: settings of the method, for `less` the fields of `LessConfig`, for `signal` those of `SignalSettings`,
            for `dynamics` those of `DynamicsSettings`, for `token_rule` those of `TokenRuleSettings`.
        score_model: a model that scores instead of the trained one (transfer).
    """

    method: str
    name: str = ""
    score_column: str | None = None
    drop: str = "smallest"
    settings: Mapping[str, Any] = field(default_factory=dict)
    score_model: str | None = None

    def __post_init__(self) -> None:
        _check_plain(self, "A selector's ")
        if not isinstance(self.settings, Mapping):
            raise InputError(f"A selector's settings must be a mapping, got {self.settings!r}.")
        scorer = "" if self.score_model is None else f" by {slug(self.score_model)}"
        object.__setattr__(self, "name", self.name or (self.score_column or self.method) + scorer)
        one_of("drop", self.drop, ("largest", "smallest"))
        if self.drop != "smallest":
            _check_drop(self.method)
        for baseline in (FULL, RANDOM):  # the table compares the other selectors with them, by their names
            if (self.name == baseline) != (self.method == baseline):
                raise InputError(f"The name '{baseline}' is for the method '{baseline}', which has no other name.")
        if (self.method == COLUMN) != (self.score_column is not None):
            raise InputError(f"score_column goes with the method '{COLUMN}', which needs one.")

    @property
    def column(self) -> str | None:
        """The column of the user's dataset that it needs; None for none."""
        return self.score_column or (self.settings.get("spans") if self.method == TOKEN_RULE else None)

    @classmethod
    def of(cls, entry: Any) -> SelectorConfig:
        """The selector of a YAML entry: a name, or a mapping. Raises InputError for anything else.

        With `probe`, the folder of a probe, the method is `signal`, with the settings that the probe recommends. With
        `dynamics`, a criterion of learning dynamics, the method is `dynamics`, by that criterion. With `token_rule`,
        the name of a rule, the method is `token_rule`, with that rule.
        """
        if isinstance(entry, str):
            return cls(entry)
        if isinstance(entry, Mapping) and PROBE in entry:
            entry = recommended_selector(entry)
        if isinstance(entry, Mapping) and DYNAMICS in entry:
            entry = _named_by(DYNAMICS, "by", "its criterion", entry)
        if isinstance(entry, Mapping) and TOKEN_RULE in entry:
            entry = _named_by(TOKEN_RULE, "rule", "its rule", entry, prefix="token_")
        if isinstance(entry, Mapping) and "score_column" in entry:
            entry = {"method": COLUMN, **entry}
        if not isinstance(entry, Mapping) or "method" not in entry:
            raise InputError(f"A selector must be a name, or a mapping with 'method', got {entry!r}.")
        _check_names("a selector", entry, cls)
        if "drop" in entry:
            _check_drop(entry["method"])
        if isinstance(entry.get("settings"), Mapping):
            entry = {**entry, "settings": _with_numbers(entry["settings"])}
        return cls(**entry)


@dataclass(frozen=True)
class DemoProblems:
    """The demo's problems, of which every seed makes its own.

    Attributes:
        rows: the number of rows.
        wrong_share: the share of rows with a wrong answer.
        held_out: the number of held-out problems.
    """

    rows: int = 2000
    wrong_share: float = 0.4
    held_out: int = 400

    def __post_init__(self) -> None:
        for name in ("rows", "held_out"):
            object.__setattr__(self, name, whole_number(f"demo's {name}", getattr(self, name), least=1))
        object.__setattr__(self, "wrong_share", number("demo's wrong_share", self.wrong_share, least=0))


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison: which selectors, on which models and data.

    Attributes:
        selectors: names of methods, or mappings with the fields of `SelectorConfig`.
        model: the model to train: a name, a folder, or `demo`. With several, everything is done for each of them.
        dataset, dataset_config, split: the dataset to select from: a name, a file, a folder, or `demo`.
        prompt_column, completion_column: the columns of the dataset and of the test rows. Under TRL's names, which are
            the default, the texts follow each other as they are; under others, on a new line.
        wrong_column: a column of the dataset that says which rows are wrong, if that is known.
        test_dataset, test_split: the held-out rows, marked by exact match of the number after `####` or after "The
            answer is"; from the same dataset by default.
        tasks: tasks or groups of lm-evaluation-harness to test on instead. The metric is their mean.
        task_folder: a folder with task files of your own.
        task_limit: the number of documents of each task; all by default.
        unsafe_code: whether tasks may run the code that a model writes on this machine, as HumanEval does.
        demo: the problems, if `dataset` is `demo`.
        keep: the shares of the rows to keep.
        seeds: the seeds. Every selector is trained once with each.
        score_model: a model that scores instead of the trained one, for every selector without one of its own.
        proxy_model: the small model of superfiltering.
        reference_model: the reference model of token cleaning; by default, the trained model tuned on the first fifth
            of the rows.
        equal_flops: whether to train everything a second time, for so long that selecting and training together cost
            as much as training on all rows.
        validation_dataset, validation_split, validation_rows: the rows that LESS and Nuggets select for, the first
            `validation_rows` of that dataset.
        loss_dataset, loss_split: rows with the same columns, on which the loss of every trained model is measured.
        max_new_tokens: the longest answer, in tokens.
        training: fields of SFTConfig.
        lora: fields of peft.LoraConfig, such as `{r: 16, target_modules: all-linear}`: every training is one of an
            adapter on the model, but for a warm-up, which has its own settings. By default, all weights are trained.
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
    loss_dataset: str | None = None
    loss_split: str = "test"
    max_new_tokens: int = 256
    training: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    output: str = "comparison"

    def __post_init__(self) -> None:
        for name in ("model", "tasks"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        _check_plain(self)
        together(self._check_numbers, self._check_training, self._check_rows, self._check_selectors, self._check_lists)
        self._check_models()

    def _check_training(self) -> None:
        for name, source in (("seed", "seeds"), ("output_dir", "output")):
            if name in self.training:
                raise InputError(f"Leave {name} out of training: the comparison sets it, see {source}.")

    def _check_numbers(self) -> None:
        for name in ("max_new_tokens", "validation_rows", "task_limit"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        shares = tuple(share("keep", each) for each in self.keep)
        seeds = tuple(whole_number("seeds", each, 0, LARGEST_SEED) for each in self.seeds)
        for name, listed, shown in (
            ("keep", shares, {f"{each:g}" for each in shares}),  # as in the names of files
            ("seeds", seeds, set(seeds)),
        ):
            _check_distinct(name, listed, len(shown))
            object.__setattr__(self, name, listed)

    def _check_rows(self) -> None:
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        changed = [name for name in NOT_FOR_DEMO if getattr(self, name) != defaults[name]]
        if self.dataset == DEMO and changed:
            raise InputError(f"{changed[0]} is for a dataset of your own, but dataset is '{DEMO}': name your dataset.")

        if self.loss_dataset is None and self.loss_split != defaults["loss_split"]:
            raise InputError("loss_split goes with loss_dataset: name one.")

    def _check_selectors(self) -> None:
        names = [each.name for each in self.selectors]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names:
            raise InputError("selectors is empty: name at least one.")
        if twice:
            raise InputError(f"Two selectors have the name '{twice[0]}'. Give one of them another name.")
        for name in names:
            if "/" in name or name.startswith("."):
                raise InputError(f"The selector's name '{name}' goes into file names: no slash, no leading dot.")
        if self.equal_flops and FULL not in names:
            raise InputError("equal_flops needs the cost of training on all rows: add the selector 'full'.")

    def _check_lists(self) -> None:
        columns = [self.prompt_column] if isinstance(self.prompt_column, str) else self.prompt_column
        for name, names, least in (("prompt_column", columns, 1), ("tasks", self.tasks, 0)):
            texts = isinstance(names, Sequence) and all(isinstance(each, str) for each in names)
            if not texts or len(names) < least or len(set(names)) < len(names):
                raise InputError(f"{name} must be a name, or a list of different names, got {names!r}.")
        if (self.task_folder or self.task_limit or self.unsafe_code) and not self.tasks:
            raise InputError("task_folder, task_limit and unsafe_code go with tasks: name some.")

    def _check_models(self) -> None:
        for model in self.model:
            if not isinstance(model, str):
                raise InputError(f"model must be a name or a folder, or a list of these, got {model!r}.")
        _check_distinct("model", self.model, len({slug(model) for model in self.model}))
        folders: dict[str, str] = {}
        for model in self.models(with_reference=False):
            folder = slug(model)
            if not folder or folders.setdefault(folder, model) != model:
                taken = f", which is that of {folders[folder]!r}" if folder else ""
                raise InputError(f"The folder of the model '{model}' would be '{folder}'{taken}: use another path.")

    def models(self, with_reference: bool = True) -> list[str]:
        """The models that are trained, and those that score them; with the reference model unless it is left out."""
        others = [self.score_model, self.proxy_model, *(each.score_model for each in self.selectors)]
        others += [self.reference_model] if with_reference else []
        return [*self.model, *(each for each in others if each is not None)]

    def to_json(self) -> dict[str, Any]:
        """The settings by name; those that earlier versions lack only where they are used."""
        without = [*(OF_LOSS if self.loss_dataset is None else ()), *(["lora"] if self.lora is None else [])]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in without}

    @classmethod
    def load(cls, path: str | Path) -> ComparisonConfig:
        """The settings in a YAML file. Raises InputError for a file that cannot be read and for an unknown setting."""
        values = read_yaml(path, f"'{path}'")
        if not isinstance(values, Mapping):
            raise InputError(f"'{path}' must be a mapping, 'name: value' on each line.")
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ComparisonConfig:
        """The settings of plain values, as in YAML."""
        _check_names("the comparison", values, cls)
        found = dict(values)
        if isinstance(found.get("seeds"), int):
            raise InputError(f"seeds must be a list, [0, 1, 2] for three seeds, got {found['seeds']}.")
        for name in ("selectors", "keep", "seeds", "model", "tasks"):
            if name in found and (isinstance(found[name], str) or not isinstance(found[name], Sequence)):
                found[name] = [found[name]]
        if "selectors" not in found:
            raise InputError("The comparison has no selectors: name at least one.")
        found["selectors"] = tuple(SelectorConfig.of(each) for each in found["selectors"])
        if found.get("lora") is None:
            found.pop("lora", None)
        for name in ("demo", "training", "lora"):
            if name in found and not isinstance(found[name], Mapping):
                raise InputError(f"{name} must be a mapping, got {found[name]!r}.")
        for name in ("training", "lora"):
            if name in found:
                found[name] = _with_numbers(found[name])
        if "demo" in found:
            _check_names("demo", found["demo"], DemoProblems)
            found["demo"] = DemoProblems(**found["demo"])
        return cls(**found)


def slug(name: str) -> str:
    """A model's name as it is written in the names of files and folders."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def _named_by(method: str, setting: str, what: str, entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The YAML entry of a selector with a method, for one that names a setting of it by the method's name.

    Args:
        method: the method, which is also the key.
        setting: the setting that has the key's value.
        what: the setting in words.
        entry: the entry with the key.
        prefix: how the selector's name begins by default.
    """
    if "method" in entry:
        raise InputError(f"A selector with '{method}' has the method '{method}': leave method out.")
    value, settings = entry[method], entry.get("settings", {})
    others = {name: given for name, given in entry.items() if name != method}
    if isinstance(settings, Mapping):
        if setting in settings:
            raise InputError(f"A selector with '{method}' has {what} there: leave {setting} out of its settings.")
        settings = {setting: value, **settings}
    name = str(value) if str(value).startswith(prefix) else f"{prefix}{value}"
    return {"name": name, **others, "method": method, "settings": settings}


def _check_drop(method: Any) -> None:
    """Raise InputError for a method whose end to drop is not the field `drop` of its selector."""
    by = {SIGNAL: "loss_sum", DYNAMICS: "mean_loss"}.get(method)
    if by is not None:
        raise InputError(f"The method '{method}' has its end to drop in its settings: {{by: {by}, drop: largest}}.")
    if method != COLUMN:
        raise InputError(f"The method '{method}' has an end to drop of its own: drop goes with score_column.")


def _with_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with numbers such as 2e-5 as numbers, which YAML 1.1 reads as text; also in mappings within."""

    def read(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _with_numbers(value)
        is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
        return float(value) if is_number else value

    return {name: read(value) for name, value in values.items()}


def _check_plain(settings: Any, whose: str = "") -> None:
    """Raise InputError where a field is not text, or not true or false, as its annotation says."""
    for each in dataclasses.fields(settings):
        value, (kinds, words) = getattr(settings, each.name), PLAIN.get(str(each.type), (object, ""))
        if not isinstance(value, kinds):
            raise InputError(f"{whose}{each.name} must be {words}, got {value!r}.")


def _check_names(what: str, values: Mapping[str, Any], kind: type) -> None:
    known = [each.name for each in dataclasses.fields(kind)]
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise InputError(f"Unknown setting '{unknown[0]}' of {what}. Known: {', '.join(known)}.")


def _check_distinct(name: str, listed: Sequence[Any], distinct: int) -> None:
    """Raise InputError unless a list has at least one entry, all of them different."""
    if not listed or distinct != len(listed):
        raise InputError(f"{name} must be a list of different entries, at least one, got {list(listed)}.")

"""The versions of other libraries: what is supported, what is newer, and what is said where something is missing."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.sources import modules
from packaging.version import Version
from transformers import Trainer
from trl import SFTConfig

from resofilter_trainer.config import InputError, VersionError, compatibility
from resofilter_trainer.config.compatibility import (
    EXTRAS,
    LEAST,
    SINCE,
    check_versions,
    has,
    installed,
    need,
    need_extra,
    training_arguments,
)

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"vl_convert": "vl-convert-python"}  # where a module has another name
NEED_LIBRARIES = ("ResonanceCallback", "Recorder", "score_dataset", "load_rows", "clean_dataset")
QUICK = ("Recorder", "load_rows")  # to import
PLAIN = {"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none"}


@pytest.fixture
def versions(monkeypatch):
    """A function that makes other versions appear to be installed; None for a missing library."""

    def set_versions(**others: str | None) -> None:
        real = {package: installed(package) for package in LEAST}
        given = {package: None if version is None else Version(version) for package, version in others.items()}
        monkeypatch.setattr(compatibility, "installed", (real | given).get)

    return set_versions


def test_the_oldest_versions_are_those_of_the_package():
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups() for each in PYPROJECT["dependencies"])
    assert {package: bounds[package] for package in LEAST} == LEAST


def test_extras_bring_what_they_are_asked_for():
    for extra, names in EXTRAS.items():
        wanted = {re.split("[<>=]", each)[0] for each in PYPROJECT["optional-dependencies"][extra]}
        assert {DISTRIBUTIONS.get(name, name) for name in names} == wanted - {"resofilter_trainer[report]"}


@functools.cache
def first_arguments() -> frozenset[object]:
    """Every constant that is the first argument of a call in the package."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in modules().values()]
    firsts = [node.args[0] for tree in trees for node in tree if isinstance(node, ast.Call) and node.args]
    return frozenset(first.value for first in firsts if isinstance(first, ast.Constant))


@pytest.mark.parametrize("feature", SINCE)
def test_an_entry_is_dropped_once_every_supported_version_has_it(feature):
    package, version = SINCE[feature]
    assert Version(LEAST[package]) < Version(version), f"remove '{feature}' and what asks for it"
    assert feature in first_arguments(), "nothing asks for it"


def test_entries_are_true_of_the_installed_versions():
    fields = SFTConfig.__dataclass_fields__
    assert has("train_sampling_strategy") == ("train_sampling_strategy" in fields)
    assert has("activation_checkpointing") == ("activation_checkpointing" in fields)
    assert has("warmup_steps below 1") == (fields["warmup_steps"].type is not int)
    assert has("loss_is_scaled_for_ga") == hasattr(Trainer, "loss_is_scaled_for_ga")
    assert has("one nll") == (fields["loss_type"].default == "nll")


def test_only_one_module_compares_versions():
    knows = [name for name, path in modules().items() if "packaging" in path.read_text()]
    assert knows == ["config.compatibility"]


def test_a_build_from_source_counts_as_its_version(monkeypatch):
    monkeypatch.setattr(compatibility.importlib.metadata, "version", lambda package: "5.19.0.dev0+abc")
    assert installed.__wrapped__("transformers") == Version("5.19")


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("transformers", "4.56.2", "transformers 4.57 or later, and 4.56.2 is installed. Upgrade it: pip install "),
        ("trl", "1.7", "needs trl 1.8 or later, and 1.7 is installed"),
        ("peft", None, "needs peft 0.18 or later, which is not installed."),
    ],
)
def test_an_older_library_is_refused_in_one_line(package, version, said, versions):
    versions(**{package: version})
    with pytest.raises(VersionError, match=re.escape(said)) as error:
        check_versions()
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ImportError)


def test_the_oldest_supported_versions_pass(versions):
    versions(**LEAST)
    check_versions()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in NEED_LIBRARIES]
)
def test_an_older_library_is_refused_at_the_import_of_what_needs_it(name):
    code = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda package: '1.7.0' if package == 'trl' else real(package)\n"
        f"from resofilter_trainer import ScoreTable\nfrom resofilter_trainer import {name}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("needs trl 1.8 or later, and 1.7.0 is installed. Upgrade it: pip install 'trl>=1.8'.")
    assert "ScoreTable" not in done.stderr


def test_what_a_later_version_has_is_asked_for_in_one_line(versions):
    versions(trl="1.14.2")
    with pytest.raises(VersionError, match=r"^A weight needs trl 1\.15 or later, and 1\.14\.2 is installed\.$"):
        need("log_probs", "A weight")
    versions(trl="1.15")
    need("log_probs", "A weight")


def test_a_missing_extra_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "altair" else find(name))
    need_extra("compare", "A comparison")
    with pytest.raises(InputError, match=r"A report needs altair, not .*: pip install 'resofilter_trainer\[report\]'"):
        need_extra("report", "A report")


NEWEST = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": 0.1,
    "learning_rate": 1e-3,
}


def test_arguments_get_the_names_of_older_versions(versions):
    versions(transformers="4.57.6")
    assert training_arguments(NEWEST) == {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "group_by_length": True,
        "warmup_ratio": 0.1,
        "learning_rate": 1e-3,
    }
    assert training_arguments({"train_sampling_strategy": "random", "warmup_steps": 5}) == {
        "group_by_length": False,
        "warmup_steps": 5,
    }
    with pytest.raises(VersionError, match=r"train_sampling_strategy='sequential' needs transformers 5\.2 or later"):
        training_arguments({"train_sampling_strategy": "sequential"})
    versions(transformers="5.23")
    assert training_arguments(NEWEST) == NEWEST


def test_the_installed_version_takes_its_names():
    args = SFTConfig(**PLAIN, **training_arguments(NEWEST))
    assert args.get_warmup_steps(100) == 10
    assert args.gradient_checkpointing is True
    assert compatibility.sampling_strategy(args) == "group_by_length"
    assert compatibility.sampling_strategy(SFTConfig(**PLAIN)) == "random"
    assert compatibility.loss_type(SFTConfig(**PLAIN)) == "nll"
    compatibility.set_warmup(args, 0.25)
    assert args.get_warmup_steps(100) == 25


@pytest.mark.parametrize(
    ("given", "steps"),
    [({"warmup_steps": 0.25}, 25), ({"warmup_steps": 6.0}, 6), ({"warmup_steps": 0.0}, 0), ({"warmup_steps": 0}, 0)],
)
def test_a_warm_up_is_settled_in_the_names_of_the_installed_version(given, steps):
    class Settings(SFTConfig):
        def __post_init__(self):
            compatibility.settle_arguments(self)
            super().__post_init__()

    assert Settings(**PLAIN, **given).get_warmup_steps(100) == steps


def test_a_warm_up_under_its_older_name_is_not_lost(versions):
    versions(transformers="4.57.6")
    args = SimpleNamespace(warmup_steps=7, warmup_ratio=0.25)
    compatibility.settle_arguments(args)
    assert args == SimpleNamespace(warmup_steps=0, warmup_ratio=0.25)
    versions(transformers="5.23")
    compatibility.settle_arguments(args)
    assert args.warmup_steps == 0.25


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_sampling_strategy": "group_by_length"}, True),
        ({"train_sampling_strategy": "random"}, False),
        ({"train_sampling_strategy": "sequential"}, False),
        ({"group_by_length": True}, True),
        ({"group_by_length": True, "train_sampling_strategy": "sequential"}, InputError),
        ({"group_by_length": True, "train_sampling_strategy": "random"}, InputError),
        ({"train_sampling_strategy": "sequental"}, VersionError),
    ],
)
def test_an_order_of_rows_is_settled_in_the_names_of_older_versions(given, expected, versions):
    versions(transformers="4.57.6")
    args = SimpleNamespace(**{"warmup_steps": 0, "group_by_length": False, **given})
    if isinstance(expected, bool):
        compatibility.settle_arguments(args)
        assert args.group_by_length is expected
    else:
        with pytest.raises(expected):
            compatibility.settle_arguments(args)


def test_the_order_of_the_rows_is_an_attribute_in_every_version():
    args = SFTConfig(**PLAIN)
    compatibility.set_sequential(args)
    assert compatibility.sampling_strategy(args) == "sequential"


def test_what_older_versions_leave_of_a_merged_adapter_is_removed(versions):
    versions(peft="0.18")
    merged = SimpleNamespace(peft_config={"default": None})
    compatibility.forget_adapter(merged)
    assert merged == SimpleNamespace()
    versions(peft="0.19")
    compatibility.forget_adapter(merged)  # which has nothing to remove

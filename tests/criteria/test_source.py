"""The hash of a criterion's code: another body gives another hash, the same body the same one, in every process."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resofilter_trainer.criteria.criterion import CRITERIA, Criterion, source_of

BODIES = ("return batch['labels'].sum(1)", "return batch['labels'].sum(1) + 1")
CLASS = "class Measure:\n    def __call__(self, model, batch):\n        {}\n"
DEFINITIONS = {
    "function": "def measure(model, batch):\n    {}\n",
    "recursion": "def make():\n    def f(model, batch):\n        f\n        {}\n    return f\nmeasure = make()\n",
    "decorated": "import torch\n@torch.no_grad()\ndef measure(model, batch):\n    {}\n",
    "cached": "import functools\n@functools.lru_cache\ndef measure(model, batch):\n    {}\n",
    "partial": "import functools\ndef f(k, model, batch):\n    {}\nmeasure = functools.partial(f, 1)\n",
    "instance": CLASS + "measure = Measure()\n",
    "inherited": CLASS + "class Mine(Measure):\n    pass\nmeasure = Mine()\n",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\n" + CLASS + "    k: int = 1\nmeasure = Measure()\n",
    "method": CLASS + "measure = Measure().__call__\n",
    "class method": "class Measure:\n    @classmethod\n    def of(cls, rows):\n        {}\nmeasure = Measure.of\n",
}


def from_file(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hash of what a file calls `measure`."""
    folder.mkdir()
    (folder / "mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    return source_of(Criterion(module.measure))


def without_source(text: str) -> str:
    """The hash of what was typed at a prompt."""
    names = {"__name__": "typed"}
    exec(compile(text, "<typed>", "exec", dont_inherit=True), names)
    return source_of(Criterion(names["measure"]))


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
def test_another_body_is_another_hash(definition, tmp_path, monkeypatch):
    texts = [definition.format(body) for body in (BODIES[0], BODIES[0], BODIES[1])]
    first, same, other = (from_file(text, tmp_path / str(i), monkeypatch) for i, text in enumerate(texts))
    assert first == same != other
    first, same, other = map(without_source, texts)
    assert first == same != other


def test_lambdas_of_one_line_differ():
    one, other, same = lambda model, batch: 1, lambda model, batch: 2, lambda model, batch: 1
    assert source_of(Criterion(one)) == source_of(Criterion(same)) != source_of(Criterion(other))


def test_so_does_another_way_to_join():
    two = Criterion(torch.mean, join=np.mean)
    assert len({source_of(each) for each in (two, Criterion(torch.mean), Criterion(torch.mean, join=np.sum))}) == 3


def test_compiled_functions_have_their_names():
    assert len({source_of(Criterion(each)) for each in (torch.mean, torch.sum, np.exp, np.log, len, max)}) == 6


def power(exponent, model, batch):
    return batch["labels"].sum(1) ** exponent


def test_a_partial_counts_what_it_holds():
    partials = [functools.partial(power, each) for each in (1, 2, 1, [{"a": {1, 2}}], len)]
    hashes = [source_of(Criterion(each)) for each in partials]
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 4


def test_a_closure_counts_what_it_holds():
    def made(held):
        return Criterion(lambda model, batch: held)

    assert source_of(made(1)) == source_of(made(1)) != source_of(made(2))
    assert source_of(made(torch.zeros(3))) == source_of(made(torch.ones(3)))  # no plain value


def test_attributes_do_not_count():
    class Measure:
        def __call__(self, model, batch):
            self.seen = batch

    first, other = Measure(), Measure()
    other(None, {})
    assert source_of(Criterion(first)) == source_of(Criterion(other))


def test_a_list_that_holds_itself_is_no_endless_one():
    held: list = []
    held.append(held)
    assert source_of(Criterion(functools.partial(power, held)))


@pytest.mark.slow
def test_another_process_has_the_same_hashes():
    """Though it goes through a set in another order."""
    code = (
        "from resofilter_trainer.criteria.criterion import CRITERIA, Criterion, source_of\n"
        "mine = Criterion(lambda model, batch: model in {'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})\n"
        "print(*map(source_of, (*CRITERIA.values(), mine)))"
    )
    mine = Criterion(lambda model, batch: model in {"a", "b", "c", "d", "e", "f", "g", "h"})
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [source_of(each) for each in (*CRITERIA.values(), mine)], done.stderr


def test_every_criterion_has_its_own():
    assert len({source_of(each) for each in CRITERIA.values()}) == len(CRITERIA)

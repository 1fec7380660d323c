"""Every example of README.md and the pages runs as it is written; there, names of the hub are folders."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.examples import (
    ROOT,
    blocks_of,
    commands_of,
    containers_of,
    parse_for_recipe,
    recipe_lines,
    run_block,
    run_command,
)
from helpers.hub import serving
from helpers.probes import result
from safetensors.torch import load_file, save_file

from resofilter_trainer.cli import entry
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"", "text", "bash", "python", "yaml", "{toctree}", "{eval-rst}", "{include}"}
MODELS = ("google/gemma-2-2b", "Qwen/Qwen3-0.6B-Base", "MODEL", "BASE", "resofilter_trainer/demo/base")
MOST_MARKED = 8


def runs(page: Path) -> bool:
    return any(each.language in ("bash", "python") and each.mark != "not run" for each in blocks_of(page))


def measures(page: Path) -> bool:
    """Whether a page loads a model: then it is slow."""
    text = "\n".join(each.code for each in blocks_of(page) if not each.mark)
    words = ("resofilter score", "resofilter probe", "resofilter clean", "SFTTrainer(", "score_dataset(")
    return any(word in text for word in words) or BEFORE.get(name_of(page)) is make_run


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_blocks_are_found():
    blocks = blocks_of(ROOT / "README.md")
    assert [each.language for each in blocks] == ["bash", "bash", "python", "python", "bash"]
    assert blocks[0].code == 'pip install -c constraints.txt -e ".[test]" && resofilter demo\n'
    assert commands_of(blocks[0].code)[1] == ["resofilter", "demo"]
    assert (ROOT / "README.md").read_text().splitlines()[blocks[2].line - 1] == blocks[2].code.splitlines()[0]
    assert commands_of("a \\\n  b  # c\n# d\ne && f\n") == [["a", "b"], ["e"], ["f"]]


@pytest.mark.parametrize("launcher", ["torchrun --nnodes 2 -m --", "accelerate launch -m", "srun torchrun -m --"])
def test_the_options_of_a_launcher_and_of_what_it_launches_are_known(launcher):
    command = f"{launcher} resofilter_trainer.cli score --model m"
    run_command(command.split(), only_parsed=True)
    for wrong in (
        f"{command} --nothing",
        command.replace("launch ", "launch --nothing ").replace("run ", "run --nope "),
    ):
        with pytest.raises((AssertionError, SystemExit)):
            run_command(wrong.split(), only_parsed=True)


def test_the_job_of_kubernetes_is_found():
    page = ROOT / "docs" / "tasks" / "several_machines.md"
    (block,) = [each for each in blocks_of(page) if each.language == "yaml"]
    (container,) = [each for document in yaml.safe_load_all(block.code) for each in containers_of(document)]
    assert container["command"][0] == "torchrun"


def test_few_blocks_are_not_run_and_each_says_why():
    marked = [each for page in PAGES for each in blocks_of(page) if each.mark]
    assert len(marked) <= MOST_MARKED
    assert {each.language for page in PAGES for each in blocks_of(page)} <= {*LANGUAGES}


def test_every_fence_is_a_block():
    """One that is not found would not be run."""
    for page in PAGES:
        found = sum(line.strip().startswith("```") for line in page.read_text().splitlines())
        assert found == 2 * len(blocks_of(page)), page


def make_run() -> None:
    from trl import SFTConfig, SFTTrainer

    from resofilter_trainer import ColumnMapping, DataSelector, ResonanceCallback, load_rows, map_columns

    rows = map_columns(load_rows("rows.jsonl"), ColumnMapping(prompt_column="question", completion_column="answer"))
    args = SFTConfig("run", num_train_epochs=2, bf16=False, use_cpu=True, report_to="none")
    callback = ResonanceCallback(keep=1.0)
    SFTTrainer(str(BASE), args, train_dataset=rows, callbacks=[callback]).train()
    callback.scores.save("scores")
    DataSelector(keep=0.5).select(callback.scores).save("kept")


def make_probe() -> None:
    words = "--model MODEL --dataset rows.jsonl --prompt_column question --completion_column answer"
    entry.main(["probe", *words.split(), "--no_self_made", "--kinds", "number", "--faults_per_kind", "16"])


def make_texts() -> None:
    from resofilter_trainer import ColumnMapping, load_rows, map_columns

    columns = ColumnMapping(prompt_column="question", completion_column="answer")
    map_columns(load_rows("rows.jsonl"), columns).select_columns(["prompt", "completion"]).to_json("texts.jsonl")


# What a page takes for granted: the output of a command that another page shows.
BEFORE: dict[str, Callable[[], object]] = {
    "docs/ledger.md": make_run,
    "docs/probe.md": make_probe,
    "docs/token_rules.md": make_texts,
    "docs/signals.md": lambda: result().save("probe"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, and with a tiny model under every name that the pages use."""
    problems = make_problems(24, 0.4, seed=0)
    rows = [{"question": each.prompt, "answer": each.completion, "id": f"row-{number}", "source": "ab"[number % 2]}
            for number, each in enumerate(problems)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in MODELS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(BASE)
    shutil.copytree(BASE, tmp_path / "REF")
    weights = load_file(tmp_path / "REF" / "model.safetensors")
    torch.manual_seed(0)
    changed = {key: each + 1e-3 * torch.randn(each.shape) for key, each in weights.items()}
    save_file(changed, tmp_path / "REF" / "model.safetensors", {"format": "pt"})
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub() -> Iterator[contextlib.ExitStack]:
    """Closes the stand-in for the hub, if a page needs one."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.filterwarnings("ignore")  # of other libraries, and of saturated scores: the model and the rows are tiny
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if measures(page) else [])
     for page in PAGES if runs(page)],
)  # fmt: skip
def test_the_examples_of_a_page_run(page, place, capsys, monkeypatch, hub):
    if name_of(page) == "docs/hub.md":
        hub.enter_context(serving(monkeypatch, place / "cache"))
    BEFORE.get(name_of(page), lambda: None)()
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.mark == "not run":
            continue
        try:
            run_block(block, names)
        except SystemExit as stopped:
            raise AssertionError(f"{name_of(page)}, line {block.line}: {capsys.readouterr().err}") from stopped


def test_the_settings_of_a_comparison_are_those_of_the_recipe():
    (block,) = [each for each in blocks_of(ROOT / "docs/tasks/comparison.md") if each.language == "yaml"]
    recipe = yaml.safe_load((ROOT / "recipes" / "compare.yaml").read_text())
    shown = yaml.safe_load(block.code)
    assert {name: recipe[name] for name in shown} == shown


def test_what_is_said_to_recipes_they_understand(monkeypatch, capsys):
    """In the pages, among the results and in the recipes themselves; what the file of `--config` says, too."""
    monkeypatch.chdir(ROOT)
    pages = [*PAGES, *sorted((ROOT / "recipes").glob("*.py")), ROOT / "benchmarks" / "RESULTS.md"]
    commands = [(page, words) for page in pages for words in recipe_lines(page)]
    assert len(commands) > 8
    for page, words in commands:
        place = words.index("--config") if "--config" in words else len(words)
        made = place < len(words) and not (ROOT / words[place + 1]).exists()  # by another example
        known = words[:place] + words[place + 2 :] if made else words
        try:
            parse_for_recipe(known)
        except SystemExit as stopped:
            raise AssertionError(f"{name_of(page)}: {words}: {capsys.readouterr().err}") from stopped
    with pytest.raises(SystemExit):
        parse_for_recipe(["python", "recipes/gsm8k.py", "--keeep", "0.5"])

"""The command that cleans tokens: what it writes, and the one line that reports a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.commands import files_in, refused, write
from helpers.tokenizers import make_tokenizer
from helpers.training import llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from resofilter_trainer.cli.entry import main
from resofilter_trainer.scores.token_scores import TokenScores

ROWS = [
    {"prompt": f"what is {i} + 2 ?", "completion": " answer:" + " 3" * (1 + i % 5), "source": "ab"[i % 2]}
    for i in range(12)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A folder with models and rows, which no test changes."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("base", 0), ("reference", 1)):
        llama(len(tokenizer), seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(2)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llama(len(tokenizer)), adapter).save_pretrained(folder / "adapter")
    other = make_tokenizer()
    other.add_tokens(["fox_fox"])
    llama(len(other)).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    write(folder / "rows.jsonl", ROWS)
    write(folder / "prompts.jsonl", [{"prompt": "long " * 40, "completion": " 3"}] * 6)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """A file that is written to the current folder would be found as well."""
    monkeypatch.chdir(tmp_path)


def one_line(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """As `refused`, with nothing else on stderr but progress bars."""
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in argv])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not ("%|" in line or "examples [" in line)]
    assert (stopped.value.code, len(lines), printed.out) == (2, 1, "")
    assert lines[0].startswith("resofilter clean: error: ")
    return lines[0]


def usual(place: Path, output: Path, *more: object) -> list[str]:
    argv = ["clean", "--model", place / "base", "--dataset", place / "rows.jsonl", "--output", output, *more]
    return [str(each) for each in argv]


def labels_kept(folder: Path) -> dict[int, int]:
    """How many labels of each row are kept."""
    rows = load_from_disk(folder)
    return {row["sample_id"]: sum(label != -100 for label in row["labels"]) for row in rows}


@pytest.mark.parametrize("reference", ["reference", "adapter"])
def test_fixed(reference, place, tmp_path, capsys):
    output = tmp_path / "out"
    main(usual(place, output, "--reference", place / reference, "--keep_tokens", 0.3, "--group_by", "source"))
    printed = capsys.readouterr().out.splitlines()
    tokens = len(TokenScores.load(output))
    assert sum(labels_kept(output).values()) == int(tokens * 0.3)
    assert printed[0] == f"{int(tokens * 0.3)} of {tokens} tokens kept ({int(tokens * 0.3) / tokens:.1%})"
    assert [line[:5] for line in printed[1:3]] == ["  a: ", "  b: "]
    place_of_lines = printed.index(f"Dataset to train on: {output} (datasets.load_from_disk)") + 1
    assert printed[place_of_lines] == "To train on it, in Python:"
    assert f"    rows = load_rows({str(output)!r})" in printed[place_of_lines:]
    assert printed[-1] == f"    SFTTrainer({str(place / 'base')!r}, args, train_dataset=rows).train()"
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["keep_tokens"], summary["ranking"]) == (0.3, "global")
    assert TokenScores.load(output).provenance.source["dataset"] == str(place / "rows.jsonl")


def test_the_current_folder_is_an_output_and_the_trained_model_has_a_folder_in_it(place, capsys):
    main(usual(place, Path("."), "--reference", place / "reference", "--trust_remote_code"))
    printed = capsys.readouterr().out
    assert "    args = SFTConfig('trained', bf16=gpu, use_cpu=not gpu, trust_remote_code=True)\n" in printed
    assert "    rows = load_rows('.')\n" in printed


def test_sixty_percent_of_all_is_the_default(place, tmp_path):
    main(usual(place, tmp_path / "out", "--reference", place / "reference"))
    assert sum(labels_kept(tmp_path / "out").values()) == int(len(TokenScores.load(tmp_path / "out")) * 0.6)


def test_rho_ranks_within_each_sample(place, tmp_path):
    output = tmp_path / "out"
    main(usual(place, output, "--reference", place / "reference", "--mode", "rho", "--keep_tokens", 0.5))
    tokens = TokenScores.load(output).num_tokens
    assert labels_kept(output) == {row: int(count * 0.5) for row, count in enumerate(tokens)}
    assert json.loads((output / "summary.json").read_text())["ranking"] == "sample"


def test_users_columns_and_lengths_reach_the_rows(place, tmp_path):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS] + [
        {"question": ROWS[0]["prompt"], "answer": " 9"},
        {"question": "blank", "answer": " "},
        {"question": "long " * 60, "answer": " 9"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    more = ["--prompt_column", "question", "--completion_column", "answer", "--drop_duplicates", "--drop_empty"]
    more += ["--max_length", 40, "--keep_tokens", 1, "--reference", place / "reference", "--dataset", source]
    main(usual(place, tmp_path / "out", *more))
    assert list(labels_kept(tmp_path / "out")) == list(range(12))


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_self_evolving(rank, place, tmp_path, capsys):
    output = tmp_path / "out"
    training = ["--lora_r", rank, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]
    training += ["--learning_rate", 1e-2, "--parts", 3]
    main(usual(place, output, "--mode", "self-evolving", "--keep_tokens", 0.5, "--group_by", "source", *training))
    printed = capsys.readouterr().out
    stages = json.loads((output / "summary.json").read_text())["stages"]
    for stage in stages:
        assert f"stage {stage['stage']}: {stage['tokens_kept']} of {stage['tokens']} tokens kept" in printed
        assert stage["tokens_kept"] == (stage["tokens"] if stage["stage"] == 0 else stage["tokens"] // 2)
    assert sum(labels_kept(output).values()) == sum(stage["tokens_kept"] for stage in stages)
    model = AutoModelForCausalLM.from_pretrained(output / "stage-2" / "model")
    first = AutoModelForCausalLM.from_pretrained(place / "base").state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, first[name])}
    assert ("model.embed_tokens.weight" in changed) == (rank == 0)
    assert "model.layers.3.mlp.up_proj.weight" in changed
    settings = json.loads((output / "stages.json").read_text())["training"]
    assert settings["learning_rate"] == 1e-2
    assert settings["num_train_epochs"] == 1
    assert settings["train_sampling_strategy"] == "sequential"


def test_yaml_says_the_same(place, tmp_path):
    settings = {"reference": str(place / "reference"), "keep_tokens": 0.3, "mode": "rho", "group_by": "source"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    main(usual(place, tmp_path / "yaml", "--config", tmp_path / "run.yaml"))
    line = [each for name, value in settings.items() for each in (f"--{name}", value)]
    main(usual(place, tmp_path / "line", *line))
    assert load_from_disk(tmp_path / "yaml").to_list() == load_from_disk(tmp_path / "line").to_list()
    assert (tmp_path / "yaml" / "summary.json").read_text() == (tmp_path / "line" / "summary.json").read_text()


def test_cleaning_again_with_another_share_replaces(place, tmp_path):
    for keep in (1, 0.3):
        main(usual(place, tmp_path / "out", "--reference", place / "reference", "--keep_tokens", keep))
    assert sum(labels_kept(tmp_path / "out").values()) == int(len(TokenScores.load(tmp_path / "out")) * 0.3)


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        (["--rule", "profit"], {"threshold": 0.1}),
        (["--rule", "stm", "--threshold", 300], {"threshold": 300.0}),
        (["--rule", "conflict", "--keep_tokens", 0.5], {"keep": 0.5}),
        (["--rule", "random", "--seed", 7], {"keep": 0.6, "seed": 7}),
        (["--rule", "all_but_first", "--first", 2], {"first": 2}),
        (["--rule", "sstoken", "--reference", "{place}/reference"], {"keep": 0.6, "gamma": 1.0}),
        (["--rule", "sstoken", "--gamma", 0.5, "--reference", "{place}/reference"], {"keep": 0.6, "gamma": 0.5}),
        (["--rule", "eaft"], {}),
    ],
)
def test_a_rule(more, settings, place, tmp_path, capsys):
    if more[1] == "profit":  # an untrained model finds every token improbable
        assert "the weight 0" in refused(capsys, *usual(place, tmp_path / "out", *more))
        return
    main(usual(place, tmp_path / "out", "--group_by", "source", *in_place(more, place)))
    printed = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rule"], summary["settings"]) == (more[1], settings)
    assert printed[0].startswith(f"{summary['tokens_kept']} of {summary['tokens']} tokens kept")
    assert ("token_weights" in load_from_disk(tmp_path / "out").column_names) == (more[1] == "eaft")
    assert printed[-1].endswith("callbacks=[TokenWeights()]).train()") == (more[1] == "eaft")
    if more[1] == "eaft":
        assert any(line.startswith("  mean weight of a token: ") for line in printed)
        assert "    from resofilter_trainer import TokenWeights, load_rows" in printed


@pytest.mark.parametrize(("rule", "mode"), [("token_cleaning", "fixed"), ("rho", "rho")])
def test_the_rules_of_a_mode_are_that_mode(rule, mode, place, tmp_path):
    reference = ["--reference", place / "reference", "--keep_tokens", 0.4]
    main(usual(place, tmp_path / "rule", "--rule", rule, *reference))
    main(usual(place, tmp_path / "mode", "--mode", mode, *reference))
    assert (tmp_path / "rule" / "summary.json").read_text() == (tmp_path / "mode" / "summary.json").read_text()


EVOLVE = ("--mode", "self-evolving")
BAD = {
    "nothing kept": (
        ["--reference", "{place}/reference", "--keep_tokens", 0],
        "--keep_tokens is the share of the tokens to keep, above 0",
    ),
    "more than all": (["--reference", "{place}/reference", "--keep_tokens", 1.5], "above 0 and at most 1, got 1.5"),
    "no number": (["--reference", "{place}/reference", "--keep_tokens", "nan"], "above 0 and at most 1, got nan"),
    "share of self": ([*EVOLVE, "--keep_tokens", 1.5], "above 0 and at most 1"),
    "no such reference": (["--reference", "/nowhere/model"], "no reference model at '/nowhere/model'"),
    "reference without network": (["--reference", "nobody/nothing"], "no reference model in a folder 'nobody/nothing'"),
    "folder that is no model": (["--reference", "{place}"], "cannot be loaded"),
    "no reference": ([], "--reference is missing"),
    "no reference for rho": (["--mode", "rho"], "--reference is missing"),
    "self as a reference": (["--reference", "self"], "self"),
    "reference and self": (
        [*EVOLVE, "--reference", "{place}/reference"],
        "leave --reference out, or use --mode fixed.",
    ),
    "rho over all": (
        ["--mode", "rho", "--ranking", "global", "--reference", "{place}/reference"],
        "--mode rho ranks within each sample",
    ),
    "unknown ranking": (["--ranking", "bogus", "--reference", "{place}/reference"], "error: --ranking must be one of"),
    "one part": ([*EVOLVE, "--parts", 1], "--parts must be a whole number of at least 2"),
    "more parts than rows": ([*EVOLVE, "--parts", 13], "12 rows have tokens to learn, too few for --parts 13"),
    "unknown mode": (["--mode", "bogus", "--reference", "{place}/reference"], "--mode must be one of 'fixed'"),
    "other vocabulary": (["--reference", "{place}/other"], "another vocabulary"),
    "no such model": (["--model", "/nowhere/model", "--reference", "{place}/reference"], "no model at '/nowhere"),
    "no such dataset": (["--dataset", "/nowhere/x.json", "--reference", "{place}/reference"], "no dataset at"),
    "prompts only": (
        ["--dataset", "{place}/prompts.jsonl", "--max_length", 20, "--reference", "{place}/reference"],
        "has a token to learn",
    ),
    "prompts only, evolving": (
        [*EVOLVE, "--dataset", "{place}/prompts.jsonl", "--max_length", 20],
        "has a token to learn",
    ),
    "unknown group": (["--group_by", "bogus", "--reference", "{place}/reference"], "no column 'bogus'"),
    "unknown group, evolving": ([*EVOLVE, "--group_by", "bogus"], "no column 'bogus'"),
    "unknown rule": (["--rule", "proffit"], "Did you mean 'profit'?"),
    "rule without its reference": (["--rule", "sstoken"], "needs 'earlier_loss': pass --reference, a model"),
    "rule with a reference": (
        ["--rule", "profit", "--reference", "{place}/reference"],
        "needs no reference model: leave --reference out",
    ),
    "rule without a share": (["--rule", "eaft", "--keep_tokens", 0.5], "'eaft' has no setting --keep_tokens"),
    "rule with share and bound": (
        ["--rule", "stm", "--keep_tokens", 0.5, "--threshold", 3],
        "Pass one of --keep_tokens and --threshold",
    ),
    "rule and mode": (["--rule", "stm", *EVOLVE], "--mode is for --rule token_cleaning: leave it out with --rule stm."),
    "rule and ranking": (["--rule", "stm", "--ranking", "sample"], "--ranking is for --rule token_cleaning"),
    "two rankings": (["--rule", "token_cleaning", "--mode", "rho"], "for a ranking by row, pass --rule rho"),
    "two rankings by name": (
        ["--rule", "token_cleaning", "--ranking", "sample"],
        "for a ranking by row, pass --rule rho",
    ),
    "rho in stages": (["--rule", "rho", *EVOLVE], "with --mode self-evolving, pass --ranking sample"),
    "bound without a rule": (["--threshold", 3, "--reference", "{place}/reference"], "--threshold goes with --rule"),
    "no batch": (["--tokens_per_batch", 0, "--reference", "{place}/reference"], "tokens_per_batch"),
    "no batch, evolving": ([*EVOLVE, "--per_device_train_batch_size", 0], "per_device_train_batch_size"),
}
TRACEBACK = {
    "negative rank": [*EVOLVE, "--lora_r", -1],
    "no accumulation": [*EVOLVE, "--gradient_accumulation_steps", 0],
    "nothing learnt": [*EVOLVE, "--keep_tokens", 1e-4],
}


def in_place(arguments: list[object], place: Path) -> list[str]:
    return [str(each).replace("{place}", str(place)) for each in arguments]


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(name, place, tmp_path, capsys):
    arguments, expected = BAD[name]
    assert expected in one_line(capsys, *usual(place, tmp_path / "out", *in_place(arguments, place)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TRACEBACK)
def test_training_that_cannot_work_is_refused_in_one_line(name, place, tmp_path, capsys):
    refused(capsys, *usual(place, tmp_path / "out", *in_place(TRACEBACK[name], place)))


def test_a_share_so_small_that_no_token_stays_is_refused(place, tmp_path, capsys):
    refused(capsys, *usual(place, tmp_path / "out", "--reference", place / "reference", "--keep_tokens", 1e-4))


@pytest.mark.parametrize("missing", ["model", "dataset", "output"])
def test_what_is_missing_is_named(missing, place, tmp_path, capsys):
    given = {"model": place / "base", "dataset": place / "rows.jsonl", "output": tmp_path / "out"}
    argv = [str(each) for name, value in given.items() if name != missing for each in (f"--{name}", value)]
    assert f"--{missing} is missing" in refused(capsys, "clean", *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_else_is_refused_and_left_alone(place, tmp_path, capsys):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "out")
    before = files_in(tmp_path)
    for more in (["--reference", place / "reference"], EVOLVE):
        assert "made in another way" in refused(capsys, *usual(place, tmp_path / "out", *more))
    assert files_in(tmp_path) == before
    assert load_from_disk(tmp_path / "out").to_list() == ROWS


def test_scores_of_another_reference_are_refused_and_left_alone(place, tmp_path, capsys):
    output = tmp_path / "out"
    main(usual(place, output, "--reference", place / "reference", "--keep_tokens", 0.3))
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    capsys.readouterr()
    message = refused(capsys, *usual(place, output, "--reference", place / "adapter"))
    assert "reference_weights" in message
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


@pytest.mark.parametrize("content", ["keep_token: 0.5", "keep_tokens: much", "parts: 2.5", "mode: bogus"])
def test_yaml_that_cannot_work_is_refused(content, place, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content)
    argv = usual(place, tmp_path / "out", "--reference", place / "reference", "--config", tmp_path / "run.yaml")
    refused(capsys, *argv)
    assert files_in(tmp_path) == ["run.yaml"]

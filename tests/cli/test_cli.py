"""The commands, as a user runs them: what they write, and the one line that reports a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.commands import EMPTY, QUESTIONS, ROWS, files_in, refused, write
from helpers.tokenizers import make_tokenizer
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from trl import SFTTrainer

from resofilter_trainer.cli.entry import main
from resofilter_trainer.criteria.criterion import CRITERIA
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.selecting.selection import Selection

# ---- folders to work on


@dataclass(frozen=True)
class Place:
    """A folder with models and datasets, which no test changes."""

    folder: Path
    model: Path
    rows: Path

    def save(self, name: str, model: PreTrainedModel, tokenizer: Any) -> Path:
        model.save_pretrained(self.folder / name)
        tokenizer.save_pretrained(self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir) -> Place:
    folder = tmp_path_factory.mktemp("place")
    return Place(folder, tiny_model_dir, write(folder / "rows.jsonl", ROWS))


@pytest.fixture(scope="module")
def scored(place) -> Path:
    output = place.folder / "scores"
    main(["score", "--model", str(place.model), "--dataset", str(place.rows), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def other_model(place, tiny_llama, tokenizer) -> Path:
    return place.save("other", tiny_llama(seed=1), tokenizer)


# ---- score: bad input


def dataset_of(name: str, rows: list[dict[str, Any]], *more: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: ["--dataset", write(place.folder / f"{name}.jsonl", rows), *more]


def options(*more: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: more


BAD_SCORES: dict[str, tuple[Callable[[Place], Sequence[object]], Sequence[str]]] = {
    "unknown model path": (options("--model", "/nowhere/model"), ["no model at '/nowhere/model'"]),
    "model without network": (options("--model", "nobody/nothing"), ["no model", "'nobody/nothing'", "HF_HUB_OFFLINE"]),
    "unknown model and column": (
        options("--model", "/nowhere/model", "--prompt_column", "nope", "--completion_column", "completion"),
        ["no model at '/nowhere/model'", "'nope'"],
    ),
    "unknown model, reference and dataset": (
        options("--model", "/no/model", "--reference", "/no/other", "--signals", "all", "--dataset", "/no/rows.jsonl"),
        ["no model at '/no/model'", "no reference model at '/no/other'", "no dataset at '/no/rows.jsonl'"],
    ),
    "folder that is no model": (lambda place: ["--model", place.folder], ["model", "place"]),
    "unknown dataset path": (options("--dataset", "/nowhere/rows.jsonl"), ["no dataset at '/nowhere/rows.jsonl'"]),
    "dataset without network": (
        options("--dataset", "nobody/nothing"),
        ["no dataset", "'nobody/nothing'", "HF_HUB_OFFLINE"],
    ),
    "no usable column": (
        dataset_of("questions", QUESTIONS),
        ["question, answer, kind", "--prompt_column question --completion_column answer"],
    ),
    "column that is not there": (
        options("--prompt_column", "prompt", "--completion_column", "reply"),
        ["no column 'reply'", "prompt, completion, id"],
    ),
    "half a mapping": (options("--prompt_column", "prompt"), ["--prompt_column and --completion_column go together"]),
    "empty dataset": (dataset_of("none", []), ["none.jsonl", "has no rows"]),
    "empty completions": (dataset_of("empty", EMPTY), ["2 of 12 rows", "3, 7", "skip them with --drop_empty."]),
    "every completion empty": (
        dataset_of("blank", [{**row, "completion": ""} for row in ROWS], "--drop_empty"),
        ["12 of 12 rows cannot be learnt from", "empty completion"],
    ),
    "all labels masked": (
        options("--max_length", "4"),
        ["None of the 12 rows", "no token to learn within --max_length 4"],
    ),
    "no length": (options("--max_length", "-3"), ["max_length"]),
    "no batch": (options("--tokens_per_batch", "0"), ["--tokens_per_batch must be"]),
    "no such precision": (options("--precision", "float16"), ["precision", "'auto'", "'float32'", "'bfloat16'"]),
    "more layers than there are": (options("--n_layers", "5"), ["n_layers", "4", "got 5"]),
    "no layer": (options("--n_layers", "0"), ["--n_layers must be", "got 0"]),
    "no learning rate": (options("--lr", "0"), ["--lr", "above 0"]),
    "a learning rate that is no number": (options("--lr", "nan"), ["--lr", "above 0"]),
    "an eps that is no number": (options("--eps", "inf"), ["--eps", "above 0"]),
    "up-projection that is no regex": (options("--up_projection", "("), ["up_projection", "regular expression"]),
    "up-projection that matches nothing": (options("--up_projection", "bogus"), ["bogus", "mlp.up_proj"]),
    "unknown template": (options("--chat_template_path", "/nowhere/t.jinja"), ["/nowhere/t.jinja"]),
    "unknown template here": (options("--chat_template_path", "t.jinja"), ["no chat template at --chat_template_path"]),
    "a file's configuration": (options("--dataset_config", "main"), ["no configurations", "--dataset_config main"]),
    "the same column twice": (
        options("--prompt_column", "prompt", "--completion_column", "prompt"),
        ["'prompt' is named twice"],
    ),
    "numbers for text": (
        dataset_of("numbers", [{"prompt": 1, "completion": 2}] * 3),
        ["prompt", "whole numbers"],
    ),
    "text for messages": (dataset_of("talk", [{"messages": "hello"}] * 3), ["messages"]),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_score_refuses_in_one_line_and_leaves_nothing(name, place, tmp_path, capsys):
    arguments, expected = BAD_SCORES[name]
    usual = ["--model", place.model, "--dataset", place.rows, "--output", tmp_path / "out"]

    message = refused(capsys, "score", *usual, *arguments(place))

    assert [text for text in expected if text not in message] == [], message
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["model", "dataset", "output"])
def test_score_says_which_argument_is_missing(name, place, tmp_path, capsys):
    given = {"model": place.model, "dataset": place.rows, "output": tmp_path / "out"}
    del given[name]
    argv = [each for key, value in given.items() for each in (f"--{key}", value)]
    assert refused(capsys, "score", *argv) == f"--{name} is missing."


def with_broken_weight(model: LlamaForCausalLM, token: int, value: float) -> LlamaForCausalLM:
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_its_row(value, place, tiny_llama, tokenizer, tmp_path, capsys):
    """The embedding of `Z`, which only row 5 has, is broken."""
    model = with_broken_weight(tiny_llama(), tokenizer("Z").input_ids[0], value)
    rows = [{**row, "prompt": "Z" if row["id"] == 5 else row["prompt"]} for row in ROWS]
    message = refused(
        capsys,
        *("score", "--output", tmp_path / "out"),
        *("--model", place.save("broken", model, tokenizer)),
        *("--dataset", write(tmp_path / "rows.jsonl", rows)),
    )
    assert message.startswith("Row 5 of the dataset has loss nan")
    assert files_in(tmp_path) == ["rows.jsonl"]


def test_a_model_without_up_projection_is_refused_with_what_to_pass(place, tokenizer, tmp_path, capsys):
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=4)
    mamba = place.save("mamba", MambaForCausalLM(config), tokenizer)
    message = refused(capsys, "score", "--model", mamba, "--dataset", place.rows, "--output", tmp_path / "out")
    assert "No up-projection found in 'mamba'" in message
    assert "Pass --up_projection " in message
    assert files_in(tmp_path) == []


def test_output_with_scores_of_another_model_is_left_alone(place, scored, other_model, capsys):
    before = (scored / "scores.parquet").read_bytes()
    message = refused(capsys, "score", "--model", other_model, "--dataset", place.rows, "--output", scored)
    assert "scores made from something else" in message
    assert f"model weights ({place.model}" in message
    assert str(other_model) in message
    assert files_in(scored) == ["scores.parquet"]
    assert (scored / "scores.parquet").read_bytes() == before


def test_output_with_other_settings_names_them(place, scored, capsys):
    message = refused(
        capsys, "score", "--model", place.model, "--dataset", place.rows, "--output", scored, "--eps", "1e-4"
    )
    assert "differ in eps (1e-08 / 0.0001) " in message


@pytest.mark.parametrize("command", ["score", "select"])
def test_output_that_is_a_file_is_refused(command, place, scored, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    arguments = ["--model", place.model, "--dataset", place.rows] if command == "score" else [scored]
    assert str(tmp_path / "out") in refused(capsys, command, *arguments, "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_truncated_scores_in_the_output_are_refused(place, scored, tmp_path, capsys):
    half = (scored / "scores.parquet").read_bytes()[:200]
    (tmp_path / "scores.parquet").write_bytes(half)
    message = refused(capsys, "score", "--model", place.model, "--dataset", place.rows, "--output", tmp_path)
    assert "truncated" in message
    assert (tmp_path / "scores.parquet").read_bytes() == half


# ---- score: what works


def score(
    place: Place, output: Path, *more: object, model: Path | None = None, dataset: Path | None = None
) -> ScoreTable:
    argv = ["score", "--model", model or place.model, "--dataset", dataset or place.rows, "--output", output, *more]
    main([str(each) for each in argv])
    return ScoreTable.load(output)


def test_dropped_rows_have_a_reason_and_are_counted_in_the_summary(place, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [*EMPTY, ROWS[2]])
    scores = score(place, tmp_path / "out", "--drop_empty", "--drop_duplicates", dataset=rows)
    expected = {3: "empty completion", 7: "empty completion", 12: "same prompt as row 2"}
    assert {row: why for row, why in enumerate(scores.reasons) if why} == expected

    told = capsys.readouterr()
    printed = told.out
    stages = [line for line in told.err.splitlines() if " of 2: " in line]
    assert stages == [f"1 of 2: reading {rows}", f"2 of 2: scoring 13 rows with {place.model}"]
    assert "13 rows, 10 scored" in printed
    assert "2 not scored: empty completion" in printed
    assert "1 not scored: same prompt as another row" in printed
    assert str(tmp_path / "out" / "scores.parquet") in printed


def test_tokenizer_without_pad_token_is_no_error(place, scored, tiny_llama, tmp_path):
    model = place.save("nopad", tiny_llama(), make_tokenizer(eos_token="<eos>"))
    scores = score(place, tmp_path / "out", model=model)
    assert scores.column("loss").tolist() == ScoreTable.load(scored).column("loss").tolist()


def test_second_run_reuses_the_scores(place, scored, capsys):
    written = (scored / "scores.parquet").stat().st_mtime_ns
    score(place, scored)
    assert (scored / "scores.parquet").stat().st_mtime_ns == written
    assert "12 rows, 12 scored" in capsys.readouterr().out


def test_prompt_column_is_the_same_in_yaml_and_on_the_command_line(place, tmp_path):
    """Scores made by one are reused by the other."""
    rows, output = write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "out"
    (tmp_path / "run.yaml").write_text("prompt_column: question\n")
    first = score(place, output, "--prompt_column", "question", "--completion_column", "answer", dataset=rows)
    again = score(place, output, "--config", tmp_path / "run.yaml", "--completion_column", "answer", dataset=rows)
    assert again.provenance == first.provenance


def test_several_prompt_columns(place, scored, tmp_path):
    parts = [{"a": row["prompt"][:4], "b": row["prompt"][4:], "c": row["completion"]} for row in ROWS]
    whole = [
        {"prompt": row["prompt"][:4] + "\n\n" + row["prompt"][4:] + "\n", "completion": row["completion"]}
        for row in ROWS
    ]
    columns = ["--prompt_column", "a", "b", "--completion_column", "c"]
    split = score(place, tmp_path / "split", *columns, dataset=write(tmp_path / "parts.jsonl", parts))
    joined = score(place, tmp_path / "joined", dataset=write(tmp_path / "whole.jsonl", whole))
    assert split.provenance.dataset == joined.provenance.dataset != ScoreTable.load(scored).provenance.dataset


@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")  # bfloat16 on random weights: rightly so
def test_bf16_works_without_a_gpu(place, scored, tmp_path):
    scores = score(place, tmp_path / "out", "--precision", "bfloat16")
    assert scores.provenance.preparation["autocast"] == "bfloat16"
    assert scores.column("loss") == pytest.approx(ScoreTable.load(scored).column("loss"), rel=1e-2)


# ---- YAML


def test_yaml_is_read_and_the_command_line_wins(place, tmp_path):
    settings = {"model": str(place.model), "dataset": str(place.rows), "output": str(tmp_path / "out"), "n_layers": 1}
    (tmp_path / "run.yaml").write_text(json.dumps(settings)[:-1] + ", eps: 1e-4}")  # 1e-4 is text in YAML 1.1
    main(["score", "--config", str(tmp_path / "run.yaml"), "--n_layers", "2"])

    scores = ScoreTable.load(tmp_path / "out")
    assert scores.provenance.config["n_layers"] == 2
    assert scores.provenance.config["eps"] == 1e-4
    assert [name for name in scores.table.column_names if name.startswith("layer_")] == ["layer_2", "layer_3"]


def test_yaml_may_hold_lists_flags_and_text_that_begins_with_a_dash(place, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "c": "z"}, {"a": "x", "b": "y", "c": ""}] * 2)
    (tmp_path / "run.yaml").write_text(
        'prompt_column: [a, b]\ncompletion_column: c\ndrop_empty: true\ndrop_duplicates: false\nseparator: "-> "\n'
    )
    scores = score(place, tmp_path / "out", "--config", tmp_path / "run.yaml", dataset=rows)
    assert scores.reasons == [None, "empty completion"] * 2
    assert scores.provenance.preparation["prompt_column"] == ["a", "b"]
    assert scores.provenance.preparation["separator"] == "-> "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bogus: 1", "'score' has no argument 'bogus'."),
        ("prompt_col: x", "'score' has no argument 'prompt_col'. Did you mean 'prompt_column'?"),
        ("run: 1", "'score' has no argument 'run'"),
        ("command: select", "'score' has no argument 'command'"),
        ("- model", "run.yaml"),
        ("model", "run.yaml"),
        ("model: [", "cannot be read"),
        ("n_layers: two", "n_layers"),
        ("n_layers: 2.5", "n_layers"),
        ("update: bogus", "--update must be one of 'adamw', 'sgd', got 'bogus'."),
        ("update: optimizer", "--update must be one of 'adamw', 'sgd', got 'optimizer'"),
        (None, "cannot be read"),
    ],
)
def test_yaml_that_cannot_work_is_refused(text, expected, place, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    usual = ["--model", place.model, "--dataset", place.rows, "--output", tmp_path / "out"]
    assert expected in refused(capsys, "score", "--config", path, *usual)
    assert not (tmp_path / "out").exists()


def test_empty_yaml_changes_nothing(scored, tmp_path):
    (tmp_path / "run.yaml").write_text("# keep: 0.5\n")
    main(["select", str(scored), "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")])
    assert Selection.load(tmp_path / "out").keep.sum() == 6


# ---- select


def test_kept_rows_are_those_of_the_selection_in_original_order(scored, tmp_path, capsys):
    main(["select", str(scored), "--keep", "0.25", "--output", str(tmp_path)])

    selection, scores = Selection.load(tmp_path), ScoreTable.load(scored).column("score")
    kept = load_from_disk(tmp_path / "dataset").to_list()
    assert selection.keep.sum() == 3
    assert scores[selection.keep].max() < scores[~selection.keep].min()
    assert kept == [row for row, stays in zip(ROWS, selection.keep, strict=True) if stays]
    printed = capsys.readouterr().out
    assert "9 largest 75 %" in printed
    assert "3 kept" in printed
    assert str(tmp_path / "selection.parquet") in printed
    assert str(tmp_path / "dataset") in printed


def test_kept_rows_have_the_users_own_columns(place, tmp_path):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    score(place, tmp_path / "scores", "--prompt_column", "question", "--completion_column", "answer", dataset=rows)
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept"), "--group_column", "kind"])

    kept = load_from_disk(tmp_path / "kept" / "dataset")
    assert kept.to_list() == [QUESTIONS[row] for row in Selection.load(tmp_path / "kept").sample_ids]
    assert sorted(kept["kind"]) == ["a"] * 3 + ["b"] * 3  # the share holds within each group


def test_another_selection_is_replaced_only_if_asked_for(scored, tmp_path, capsys):
    for more in ([], []):  # the same selection again is no loss
        main(["select", str(scored), "--keep", "1", "--output", str(tmp_path), *more])
    capsys.readouterr()
    again = ["select", scored, "--keep", "0.25", "--output", tmp_path]
    message = refused(capsys, *again)
    expected = f"'{tmp_path}' holds another selection. Choose another folder, or pass --overwrite to replace it."
    assert message == expected
    assert len(load_from_disk(tmp_path / "dataset")) == Selection.load(tmp_path).keep.sum() == 12
    (tmp_path / "trained").mkdir()
    said = f"{tmp_path / 'trained'} was trained on the selection that was here before: move it, or training writes over"
    main([*map(str, again), "--overwrite"])
    assert len(load_from_disk(tmp_path / "dataset")) == Selection.load(tmp_path).keep.sum() == 3
    assert said in capsys.readouterr().out
    main([*map(str, again), "--overwrite"])  # the same selection again
    assert said not in capsys.readouterr().out
    assert (tmp_path / "trained").is_dir()


def test_each_group_has_its_kept_rows_in_the_console(place, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    score(place, tmp_path / "scores", "--prompt_column", "question", "--completion_column", "answer", dataset=rows)
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept"), "--group_column", "kind"])
    printed = capsys.readouterr().out
    assert "  a: 3 of 6 rows kept; dropped: 3 largest 50 %\n" in printed
    assert "  b: 3 of 6 rows kept; dropped: 3 largest 50 %\n" in printed


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("mapped", [True, False])
def test_the_printed_lines_train(mapped, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = write(tmp_path / "rows.jsonl", QUESTIONS if mapped else ROWS)
    columns = ["--prompt_column", "question", "--completion_column", "answer"] if mapped else []
    score(place, tmp_path / "scores", *columns, "--max_length", "64", dataset=rows)
    main(["select", "scores", "--output", "kept"])
    printed = capsys.readouterr().out
    block = printed.split("To train on them, in Python:\n")[1].split("Next:")[0]

    trained, train = list[SFTTrainer](), SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self: (trained.append(self), train(self)))
    exec(block, {})  # as it is printed

    assert trained[0].state.global_step == 3  # of a batch with all rows, in each epoch
    assert trained[0].args.max_length == 64
    assert len(trained[0].train_dataset) == Selection.load("kept").keep.sum() == 6


def test_dataset_that_moved_can_be_named(place, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    score(place, tmp_path / "scores", dataset=rows)
    moved = rows.rename(tmp_path / "moved.jsonl")
    main(["select", str(tmp_path / "scores"), "--dataset", str(moved), "--output", str(tmp_path / "kept")])
    assert len(load_from_disk(tmp_path / "kept" / "dataset")) == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--keep", "0"], "--keep is the share of the rows to keep, above 0 and at most 1, got 0.0"),
        (["--keep", "-0.5"], "above 0 and at most 1"),
        (["--keep", "1.01"], "above 0 and at most 1"),
        (["--keep", "nan"], "above 0 and at most 1"),
        (["--keep", "0.5", "--threshold", "1e-5"], "one of --keep, --threshold and --band, got --keep and --threshold"),
        (["--threshold", "nan"], "must be a finite number"),
        (["--threshold", "0"], "no row"),  # an empty dataset cannot be loaded again
        (["--by", "bogus"], "no column 'bogus'"),
        (["--by", "reason"], "reason"),
        (["--group_column", "bogus"], "--group_column bogus"),
        (["--dataset", "/nowhere/rows.jsonl"], "no dataset at '/nowhere/rows.jsonl'"),
    ],
)
def test_select_refuses_in_one_line_and_leaves_nothing(arguments, expected, scored, tmp_path, capsys):
    assert expected in refused(capsys, "select", scored, "--output", tmp_path / "out", *arguments)
    assert files_in(tmp_path) == []


def test_select_needs_an_output(scored, capsys):
    assert "--output is missing" in refused(capsys, "select", scored)


def test_select_refuses_a_truncated_file(scored, tmp_path, capsys):
    path = tmp_path / "scores.parquet"
    path.write_bytes((scored / "scores.parquet").read_bytes()[:-100])
    message = refused(capsys, "select", tmp_path, "--output", tmp_path / "out")
    assert f"'{path}' cannot be read: it is truncated" in message
    assert files_in(tmp_path) == ["scores.parquet"]


def test_select_refuses_a_missing_file(tmp_path, capsys):
    assert "No scores at" in refused(capsys, "select", tmp_path, "--output", tmp_path / "out")


def test_select_refuses_scores_of_two_models(place, scored, other_model, tmp_path, capsys):
    score(place, tmp_path / "other", model=other_model)
    capsys.readouterr()
    message = refused(capsys, "select", scored, tmp_path / "other", "--output", tmp_path / "out")
    assert "do not belong together, they differ in model weights" in message
    assert not (tmp_path / "out").exists()


def test_select_refuses_rows_that_are_not_those_scored(place, scored, tmp_path, capsys):
    shorter = write(tmp_path / "rows.jsonl", ROWS[:5])
    message = refused(capsys, "select", scored, "--dataset", shorter, "--output", tmp_path / "out")
    assert "is not what was scored" in message
    assert not (tmp_path / "out").exists()


# ---- criteria and updates


def test_the_help_of_score_names_every_criterion_and_two_updates(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert f"--criterion NAME resonance, {', '.join(CRITERIA)} (default: resonance)" in text
    assert "--update {adamw,sgd} the optimizer of the step (default: adamw)" in text


def test_arguments_are_parsed_without_torch():
    code = "from resofilter_trainer.cli.entry import _parser; _parser().parse_args(['score', '--criterion', 'loss'])"
    code += "; import sys; sys.exit(', '.join({'torch', 'transformers', 'trl'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--criterion", "beauty"], f"--criterion must be one of 'resonance', {', '.join(map(repr, CRITERIA))}, got"),
        (["--update", "optimizer"], "--update must be one of 'adamw', 'sgd', got 'optimizer'"),
    ],
)
def test_score_offers_what_it_can_measure(arguments, expected, place, tmp_path, capsys):
    usual = ["--model", place.model, "--dataset", place.rows, "--output", tmp_path / "out"]
    assert expected in refused(capsys, "score", *usual, *arguments)
    assert files_in(tmp_path) == []


# ---- the rest


def test_warnings_of_a_report_name_the_options_of_score(scored, tmp_path, monkeypatch, capsys):
    warning = 'The scores are saturated. Use a larger eps, such as eps=1e-4, or update="sgd" with norm="l2".'
    numbers = SimpleNamespace(warnings=[warning])
    written = SimpleNamespace(numbers=numbers, path=tmp_path / "report.html")
    monkeypatch.setattr("resofilter_trainer.report.write_report", lambda *args: written)
    main(["report", str(scored), "--output", str(tmp_path)])
    assert "Use a larger eps, such as --eps 1e-4, or --update sgd with --norm l2." in capsys.readouterr().out


def test_each_selection_has_a_report_of_its_own(scored, tmp_path, monkeypatch):
    places: list[Path] = []

    def write_report(contents: Any, output: Path, *others: Any) -> SimpleNamespace:
        places.append(Path(output))
        return SimpleNamespace(numbers=None, path=tmp_path / "report.html")

    monkeypatch.setattr("resofilter_trainer.report.write_report", write_report)
    for name, keep in (("a", "0.5"), ("b", "0.25")):
        main(["select", str(scored), "--keep", keep, "--output", str(tmp_path / name)])
        main(["report", str(scored), "--selection", str(tmp_path / name)])
    main(["report", str(scored), "--selection", str(tmp_path / "a" / "selection.parquet")])
    main(["report", str(scored)])
    main(["report", str(scored), "--selection", str(tmp_path / "a"), "--output", str(tmp_path / "page")])
    assert places == [tmp_path / "a", tmp_path / "b", tmp_path / "a", scored, tmp_path / "page"]


def test_report_refuses_a_split_that_is_not_there(scored, tmp_path, capsys):
    message = refused(capsys, "report", scored, "--output", tmp_path / "out", "--split", "validation")
    assert "has no split 'validation'" in message
    assert not (tmp_path / "out").exists()


def test_the_published_ranks_need_a_file(tmp_path, capsys):
    assert "is a folder: name a file" in refused(capsys, "compare", "--published", "--json", tmp_path)


def test_env_prints_the_versions(capsys):
    main(["env"])
    printed = capsys.readouterr().out
    assert f"python {sys.version.split()[0]}" in printed
    assert f"torch {torch.__version__.split('+')[0]}" in printed  # not every build has its name in the metadata
    for package in ("resofilter_trainer", "transformers", "trl", "peft", "datasets", "accelerate", "evaluate"):
        assert f"\n{package} " in printed


def test_in_a_process_of_its_own_the_line_is_all_there_is(tmp_path):
    """Exit code, stderr and stdout of the command itself, without capture and fixtures."""
    code = "import sys; from resofilter_trainer.cli import main; sys.argv[0] = 'resofilter'; main()"
    argv = [sys.executable, "-c", code, "select", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("resofilter select: error: No scores at ")
    assert done.stderr.count("\n") == 1


def test_select_runs_without_torch(scored, tmp_path):
    code = f"""
import sys
from resofilter_trainer.cli import main
main(["select", {str(scored)!r}, "--output", {str(tmp_path)!r}])
sys.exit(", ".join({{"torch", "transformers", "trl"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(load_from_disk(tmp_path / "dataset")) == 6


# ---- select: files that must not be overwritten


def test_select_never_replaces_the_dataset_that_was_scored(place, tmp_path, capsys):
    own = tmp_path / "own"
    Dataset.from_list(ROWS).save_to_disk(own / "dataset")
    score(place, tmp_path / "scores", dataset=own / "dataset")
    capsys.readouterr()
    assert "is no earlier selection's" in refused(capsys, "select", tmp_path / "scores", "--output", own)
    assert len(load_from_disk(own / "dataset")) == len(ROWS)


def test_select_again_replaces_its_own_rows(scored, tmp_path):
    for keep, stay in (("0.5", 6), ("0.25", 3)):
        main(["select", str(scored), "--keep", keep, "--output", str(tmp_path / "kept"), "--overwrite"])
        assert len(load_from_disk(tmp_path / "kept" / "dataset")) == stay


def test_rows_that_changed_since_they_were_scored_are_refused(place, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    score(place, tmp_path / "scores", dataset=rows)
    write(rows, ROWS[::-1])
    capsys.readouterr()
    assert "is not what was scored" in refused(capsys, "select", tmp_path / "scores", "--output", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(place, capsys):
    usual = ["--model", place.model, "--dataset", place.rows]
    assert "Nothing can be written" in refused(capsys, "score", *usual, "--output", "/proc/resofilter/x")

"""The values of a YAML file: each kind that an option may have, and one line for any other."""

from __future__ import annotations

import pytest
from helpers.commands import refused

from resofilter_trainer.cli.entry import COMMANDS, _parser
from resofilter_trainer.cli.settings_file import yaml_arguments


def arguments(tmp_path, text: str, *argv: str) -> list[str]:
    (tmp_path / "run.yaml").write_text(text)
    parsed = _parser().parse_args([*(argv or ["score"]), "--config", str(tmp_path / "run.yaml")])
    return yaml_arguments(parsed, COMMANDS)


def check_refusal(text: str, expected: str, tmp_path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refused(capsys, "score", "--config", path).startswith(f"--config {path}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drop_empty: true", ["--drop_empty"]),
        ("drop_empty: false", []),
        ("max_length: null", ["--max_length=none"]),
        ("max_length: 12", ["--max_length=12"]),
        ("model: null", []),
        ("completion_only_loss: yes", ["--completion_only_loss=True"]),
        ("prompt_column: a", ["--prompt_column=a"]),
        ("prompt_column: [a, b]", ["--prompt_column", "a", "b"]),
        ("separator: ''", ["--separator="]),
        ("output: 2024-01-01", ["--output=2024-01-01"]),
    ],
)
def test_values_become_arguments(text, expected, tmp_path):
    assert arguments(tmp_path, text) == expected


def test_several_columns_to_rank_by(tmp_path):
    assert arguments(tmp_path, "by: [score, -loss]", "select", "scores") == ["--by=score,-loss"]


@pytest.mark.parametrize(
    ("argv", "name"),
    [(["select"], "scores"), (["report", "sc"], "source"), (["inspect", "sc"], "source"), (["compare"], "comparison")],
)
def test_what_is_named_on_the_command_line_is_not_in_the_file(argv, name, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: sc\n")
    command = f"resofilter {argv[0]} {name.upper()} --config {path}"
    said = refused(capsys, *argv, "--config", path)
    assert said == f"--config {path}: '{name}' is named on the command line: {command}"


SECTIONS = "model: m\nscore: {signals: [rank], output: s}\nselect:\n  by: [rank]\n  output: k\nclean:\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["score"], ["--model=m", "--signals", "rank", "--output=s"]),
        (["clean"], ["--model=m"]),
    ],
)
def test_a_command_reads_its_own_section(argv, expected, tmp_path):
    assert arguments(tmp_path, SECTIONS, *argv) == expected


def test_a_section_wins_over_what_stands_outside(tmp_path):
    text = "score: {output: s}\noutput: all\nselect: {output: k}\n"
    assert arguments(tmp_path, text, "select", "x") == ["--output=k"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score: {by: loss}", "'score' has no argument 'by'."),
        ("score: 3", "'score' has no argument 'score'."),
        ("sel: {by: loss}", "'score' has no argument 'sel'."),
        ("score: {output: [a, b]}", "'output' is one value, got ['a', 'b']."),
    ],
)
def test_what_a_section_cannot_have_is_one_line(text, expected, tmp_path, capsys):
    check_refusal(text, expected, tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_layers: [1, 2]", "'n_layers' is one value, got [1, 2]."),
        ("model: [a, b]", "'model' is one value, got ['a', 'b']."),
        ("drop_empty: 'yes'", "'drop_empty' is true or false, got 'yes'."),
        ("drop_empty: 1", "'drop_empty' is true or false, got 1."),
        ("drop-empty: [true]", "'drop-empty' is true or false, got [True]."),
        ("drop_empty: null", "'drop_empty' has no value: leave it out for the default, False, got None."),
        ("separator: null", "'separator' has no value: leave it out for the default, '\\n', got None."),
        ("prompt_column: {a: b}", "'prompt_column' is one value, no mapping, got {'a': 'b'}."),
        ("prompt_column: [[a], b]", "'prompt_column' is a name or a list of names, got [['a'], 'b']."),
        ("prompt_column: []", "'prompt_column' is a name or a list of names, got []."),
        ("dataset: true", "'dataset' is a number or text; quote a text that YAML reads as true or false, got True."),
        ("max_length: true", "'max_length' is a number or text; quote a text"),
        ("update: off", "'update' is a number or text; quote a text that YAML reads as true or false, got False."),
        ("config: x", "'score' has no argument 'config'."),
        ("help: true", "'score' has no argument 'help'."),
    ],
)
def test_a_value_of_another_kind_is_one_line(text, expected, tmp_path, capsys):
    check_refusal(text, expected, tmp_path, capsys)

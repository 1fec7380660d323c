"""Options as people write them: with hyphens, by TRL's names, mistyped, and with values that begin with a minus."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
from helpers.commands import refused

from resofilter_trainer import __version__
from resofilter_trainer.cli.entry import COMMANDS, _parser, exit_on_input_error, main
from resofilter_trainer.cli.parser import NEEDED
from resofilter_trainer.cli.score import SIGNALS, _check
from resofilter_trainer.cli.settings_file import yaml_arguments
from resofilter_trainer.config import InputError, nearest

NOWHERE = ["--model", "m", "--dataset", "/nowhere/rows.jsonl", "--output", "o"]  # no file: arguments are checked first
LAYERS = ["--layers", "all"]
NO_SCORES = "No scores at 'scores/scores.parquet'. Pass the folder or the file that they were written to."
IN_FLOAT32 = "--layers all measures every layer in float32"
KNOWN = ", ".join(map(repr, (*SIGNALS, "all")))


def parsed(*argv: str):
    return _parser().parse_args(argv)


def test_hyphens_and_underscores_are_the_same():
    args = parsed("score", "--prompt-column", "a", "b", "--completion-column=c", "--drop-empty", "--n-layers", "2")
    assert (args.prompt_column, args.completion_column, args.drop_empty, args.n_layers) == (["a", "b"], "c", True, 2)


def test_names_of_trl_are_understood():
    args = parsed("score", "--model_name_or_path", "m", "--dataset-name=d", "--output_dir", "o", "--ddp_timeout", "9")
    assert (args.model, args.dataset, args.output, args.timeout) == ("m", "d", "o", 9)
    assert parsed("clean", "--keep", "0.3").keep_tokens == 0.3
    args = parsed("score", "--dataset_train_split", "test", "--bf16", "--seed", "7", "--drop_empty", "True")
    assert (args.split, args.bf16, args.seed, args.drop_empty) == ("test", True, 7, True)
    args = parsed("score", "--bf16", "False", "--drop_empty", "false", "--streaming=True", "--sharded=false")
    assert (args.bf16, args.drop_empty, args.streaming, args.sharded) == (False, False, True, False)
    for false in (["--drop_empty", "FALSE"], ["--drop-empty=false"]):  # the last one wins, as over a file's
        args = parsed("score", "--drop_empty", "--n_layers", "2", *false, "--streaming")
        assert (args.drop_empty, args.n_layers, args.streaming) == (False, 2, True)


def test_bf16_is_short_for_the_precision(capsys):
    args = parsed("score", "--bf16")
    _check(args)
    assert args.precision == "bfloat16"
    args = parsed("score", "--bf16", "false")
    _check(args)
    assert args.precision == "float32"
    usual = ["--model", "m", "--dataset", "d", "--output", "o", "--bf16", "--precision", "float32"]
    expected = "--bf16 is short for --precision bfloat16: leave it or --precision float32 out."
    assert refused(capsys, "score", *usual) == expected


def test_names_in_yaml_are_spelled_alike(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nprompt-column: [a, b]\n")
    assert yaml_arguments(parsed("score", "--config", str(path))) == ["--model=m", "--prompt_column", "a", "b"]


@pytest.mark.parametrize("option", ["--by", "--title", "--threshold"])
@pytest.mark.parametrize("value", ["-num_tokens", "-1e-5", "-", "-x y"])
def test_a_value_may_begin_with_a_minus(option, value):
    command = "report" if option == "--title" else "select"
    args = parsed(command, "scores", option, value)
    found = getattr(args, option[2:])
    assert found == (float(value) if option == "--threshold" and value == "-1e-5" else value)


def test_a_known_short_option_is_no_value(capsys):
    assert "expected one argument" in refused(capsys, "select", "scores", "--by", "-h")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["score", "--prompt_col", "x"], "There is no option --prompt_col. Did you mean --prompt_column?"),
        (["score", "--promt-column=x"], "There is no option --promt-column. Did you mean --prompt_column?"),
        (["probe", "--bf16"], "There is no option --bf16. Did you mean --precision bfloat16?"),
        (["score", "--bf16", "half"], "--bf16 must be true or false, got 'half'."),
        (["clean", "--bf-16"], "There is no option --bf-16. Did you mean --bf16?"),
        (["score", "--learning_rate", "1"], "There is no option --learning_rate. Did you mean --lr?"),
        (["score", "--zzz"], "There is no option --zzz. resofilter score --help lists all."),
        (["score", "rows.jsonl"], "Nothing takes the argument 'rows.jsonl'."),
        (
            ["score", "--drop_empty", "yes"],
            "--drop_empty is true or false, got 'yes': write --drop_empty, or leave it out.",
        ),
        (
            ["score", "--drop-empty=maybe"],
            "--drop_empty is true or false, got 'maybe': write --drop_empty, or leave it out.",
        ),
        (
            ["select", "scores", "--output", "o", "--overwrite", "maybe"],
            "--overwrite is true or false, got 'maybe': write --overwrite, or leave it out.",
        ),
        (["score", "--drop_empty", "--n_layers", "2", "yes"], "Nothing takes the argument 'yes'."),
        (["select", "scores", "--no-overwrite"], "There is no option --no-overwrite: write --overwrite false."),
        (["score", "--no_drop_empty"], "There is no option --no_drop_empty: write --drop_empty false."),
        (["score", "--no-bf16"], "There is no option --no-bf16: write --bf16 false."),
        (["score", "--no-model"], "There is no option --no-model. Did you mean --model?"),
        (
            ["score", *NOWHERE, "--signals", "rank,losss"],
            f"--signals must be one of {KNOWN}, got 'losss'. Did you mean 'loss'?",
        ),
        (
            ["score", *NOWHERE, "--tokens_per_batch", "0"],
            "--tokens_per_batch must be a whole number of at least 1, got 0.",
        ),
        (["score", *NOWHERE, "--max_length", "0"], "--max_length must be a whole number of at least 1, got 0."),
        (["score", *NOWHERE, "--timeout", "0"], "--timeout must be a whole number of at least 1, got 0."),
        (["probe", *NOWHERE, "--timeout", "0"], "--timeout must be a whole number of at least 1, got 0."),
        (
            ["probe", *NOWHERE, "--signals", "all", "losss"],
            f"--signals must be one of {KNOWN}, got 'losss'. Did you mean 'loss'?",
        ),
        (["score", *NOWHERE, *LAYERS, "--limit", "0"], "--limit must be a whole number of at least 1, got 0."),
        (["score", *NOWHERE, *LAYERS, "--bf16"], f"{IN_FLOAT32}: leave --bf16 out."),
        (["score", *NOWHERE, *LAYERS, "--precision", "bfloat16"], f"{IN_FLOAT32}: leave --precision out."),
        (["score", *NOWHERE, *LAYERS, "--n_layers", "2"], f"{IN_FLOAT32}: leave --n_layers out."),
        (
            ["score", *NOWHERE, *LAYERS, "--bf16", "false"],
            "There is no model in a folder 'm' here. 'm' is not in the cache, and HF_HUB_OFFLINE=1 keeps from the hub: "
            "unset it. There is no dataset at '/nowhere/rows.jsonl'. Pass a file, a folder, or a name on the hub.",
        ),
        (["score", "--n_layers", "two"], "--n_layers must be a whole number, got 'two'."),
        (["score", "--lr=ten"], "--lr must be a number, got 'ten'."),
        (["score", "--max_length", "1e3"], "--max_length must be a whole number or none, got '1e3'."),
        (["score", "--completion_only_loss", "no"], "--completion_only_loss must be true or false, got 'no'."),
        (
            ["score", "--precision", "bf16"],
            "--precision must be one of 'auto', 'float32', 'bfloat16', got 'bf16'. Did you mean 'bfloat16'?",
        ),
        (["select"], "scores and --output are missing."),
        (["select", "scores"], "--output is missing."),
        (
            ["report"],
            "source is missing: a folder or file of scores, or the folder of a run, a cleaning, a comparison or a "
            "probe.",
        ),
        (["score", "--model", ""], "--model is empty. Pass a value, or leave it out."),
        (["score", "--prompt_column", "a", ""], "--prompt_column is empty. Pass a value, or leave it out."),
        (["select", ""], "scores is empty. Pass a value, or leave it out."),
        (["select", "scores", "--output="], "--output is empty. Pass a value, or leave it out."),
        (["select", "scores", "--output", "o", "--strata", "5"], f"--strata goes with --stratify_by. {NO_SCORES}"),
        (
            ["select", "scores", "--output", "o", "--combine", "pareto"],
            f"--combine goes with several columns in --by. {NO_SCORES}",
        ),
        (
            ["clean", "--model", "m", "--dataset", "d", "--output", "o", "--reference", "r", "--parts", "3"],
            "--parts is for --mode self-evolving: leave it out with --mode fixed.",
        ),
        (
            ["score", "--model", "m", "--dataset", "d", "--output", "o", "--sharded"],
            "--sharded is for several processes: pass --num_processes, or use accelerate launch.",
        ),
        (["score", "--model", "m"], "--dataset and --output are missing."),
        (["score"], "--model, --dataset and --output are missing."),
        (["clean", "--output", "o"], "--model and --dataset are missing."),
    ],
)
def test_what_does_not_exist_or_is_missing_is_one_line(argv, expected, capsys):
    assert refused(capsys, *argv) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["scor"], "There is no command 'scor'. Did you mean score? There are demo, score, join, select,"),
        (["zzz"], "There is no command 'zzz'. There are demo, score, join, select,"),
        ([], "Name a command: demo, score, join, select,"),
        (["-v"], "Name a command: demo, score, join, select,"),
        (["--keep", "0.5"], "Name a command: demo, score, join, select,"),
    ],
)
def test_an_unknown_command_is_one_line(argv, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"resofilter: error: {expected}")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [("adam", "adamw"), ("LARGEST", "largest"), ("self", "self-evolving"), ("larg", "largest"), ("zzz", None),
     ("", None), (3, None), (None, None)],
)  # fmt: skip
def test_the_nearest_name(word, expected):
    assert nearest(word, ["adamw", "largest", "self-evolving"]) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["score", "--criterion", "los"], "--criterion must be one of 'resonance', 'loss', .* Did you mean 'loss'"),
        (["score", "--norm", "mean"], "--norm must be one of 'mean_abs', 'l2', got 'mean'. Did you mean 'mean_abs'"),
        (["score", "--update", "adam"], "--update must be one of 'adamw', 'sgd', got 'adam'. Did you mean 'adamw'"),
        (["clean", "--mode", "self"], "--mode must be one of .* Did you mean 'self-evolving'"),
        (["clean", "--ranking", "samples"], "--ranking must be one of .* Did you mean 'sample'"),
        (["demo", "--mode", "call-back"], "--mode must be one of .* Did you mean 'callback'"),
        (
            ["select", "scores", "--drop", "biggest"],
            "--drop must be one of 'largest', 'smallest', 'both', got 'biggest'",
        ),
        (["select", "scores", "--combine", "rank"], "--combine must be one of .* Did you mean 'ranks'"),
        (["select", "scores", "--threshold", "otso"], "--threshold must be one of .* Did you mean 'otsu'"),
    ],
)
def test_an_unknown_value_names_the_known_ones(argv, expected, tmp_path, capsys):
    usual = ["--model", "gpt2", "--dataset", "rows.jsonl"] if argv[0] in ("score", "clean") else []
    with pytest.raises(SystemExit):
        main([*argv, *usual, "--output", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert_line(err, expected)
    assert not (tmp_path / "out").exists()


def assert_line(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
    assert text.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines_in_the_commands_words(capsys):
    args = parsed("score")
    with exit_on_input_error("resofilter score", args.parser):
        warnings.warn("Many rows\nrepeat: pass drop_duplicates=True.", stacklevel=1)
        warnings.warn("another library is changing", FutureWarning, stacklevel=1)
    lines = capsys.readouterr().err
    assert lines == "resofilter score: warning: Many rows repeat: pass --drop_duplicates.\n"


def test_an_error_of_a_process_names_the_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), exit_on_input_error("resofilter score", parsed("score").parser):
        raise InputError("Skip them with drop_empty=True.")
    assert capsys.readouterr().err == "resofilter score (process 3): error: Skip them with --drop_empty.\n"


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "x"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_half_an_environment_of_a_launcher_is_refused(settings, missing, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    message = refused(capsys, "score", "--model", "m", "--dataset", "d", "--output", "o")
    there = ", ".join(f"{name}={settings[name]}" for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in settings)
    assert message.startswith(f"The environment has {there} and no {missing}, as no launcher does.")


def test_a_separator_may_be_empty():
    assert parsed("score", "--separator", "").separator == ""


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"resofilter_trainer {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_two_examples_and_a_line_for_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert text.split("examples:\n")[1].count(f"  resofilter {command}") == 2
    assert "None" not in text
    assert "(default: False)" not in text
    assert text.count("\n") < 100
    parser = parsed(command, *(["x"] if command in ("inspect", "report") else [])).parser
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_parses(command):
    for example in COMMANDS[command][0].EXAMPLES:
        parsed(*example.split(" > ")[0].removeprefix("resofilter ").split())


@pytest.mark.parametrize(
    ("command", "needed"),
    [("score", "model dataset output"), ("clean", "model dataset output"), ("probe", "model dataset"),
     ("check", "dataset output"), ("select", "output"), ("join", "output")],
)  # fmt: skip
def test_what_is_required_is_marked_and_named_in_one_message(command, needed, capsys):
    """The help, the usage and the message agree."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    marked = text.split(f"{NEEDED}:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  --(\w+)", marked, flags=re.MULTILINE) == needed.split()
    assert re.findall(r"--(\w+) \.\.\.", text.splitlines()[0]) == needed.split()
    names = [*(["scores"] if command in ("select", "join") else []), *(f"--{name}" for name in needed.split())]
    several = f"{', '.join(names[:-1])} and {names[-1]} are missing."
    assert refused(capsys, command) == several


def test_defaults_and_choices_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--drop {largest,smallest,both}" in text
    assert "--combine {ranks,topsis,pareto,residual} how several columns become one (default: ranks)" in text
    assert "(default: [])" not in text
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert capsys.readouterr().out.startswith("usage: resofilter compare [COMPARISON] [options]\n")
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    assert "the random seed (default: 0)" in " ".join(capsys.readouterr().out.split())


def test_help_needs_neither_torch_nor_pandas():
    code = (
        "import sys; from resofilter_trainer.cli import main\ntry: main(['score', '--help'])\nexcept SystemExit: pass\n"
    )
    heavy = {"torch", "transformers", "datasets", "trl", "pandas", "pyarrow", "numpy"}
    code += f"sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

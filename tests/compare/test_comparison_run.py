"""A whole comparison on a few of the demo's problems: interrupted, repeated, extended, and with wrong settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest
from datasets import Dataset
from helpers.tasks import write_tasks
from trl import SFTTrainer

from resofilter_trainer import InputError, ScoreTable
from resofilter_trainer.cli.entry import main
from resofilter_trainer.compare import choosing, selector_scores
from resofilter_trainer.compare.config import ComparisonConfig, slug
from resofilter_trainer.compare.cost import parameters_of, timed
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.methods import METHODS
from resofilter_trainer.compare.report import write
from resofilter_trainer.compare.run import run
from resofilter_trainer.config import NotFiniteError
from resofilter_trainer.data.loading import default_arguments, load_weights
from resofilter_trainer.demo.run import BASE
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.scoring import passes
from resofilter_trainer.selecting.token_selection import keep_by_sample, keep_globally

SMALL = {
    "demo": {"rows": 24, "wrong_share": 0.5, "held_out": 4},
    "seeds": [0],
    "max_new_tokens": 8,
    "training": {"num_train_epochs": 1, "per_device_eval_batch_size": 4},
}

pytestmark = pytest.mark.filterwarnings("ignore:Filtering would begin")  # rightly so: one epoch of infobatch


def config(tmp_path, selectors, **changes) -> ComparisonConfig:
    return ComparisonConfig.of({**SMALL, "selectors": selectors, "output": str(tmp_path / "out"), **changes})


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Every method but `column`, which the demo's rows cannot have, trained once; the base is the small model, too."""
    names = [name for name in METHODS if name not in ("column", "less", "signal", "dynamics", "token_rule")]
    folder = tmp_path_factory.mktemp("every")
    less = {"method": "less", "settings": {"lora_r": 2, "epochs": 1}}
    signal = {"method": "signal", "settings": {"by": "loss_sum"}}
    learnt = {"method": "dynamics", "settings": {"by": "mean_loss"}}
    rule = {"method": "token_rule", "settings": {"rule": "profit"}}
    selectors = [*names, less, signal, learnt, rule]
    return run(config(folder, selectors, validation_rows=2, proxy_model=str(BASE))), folder / "out"


@pytest.mark.slow
def test_every_selector_scores_selects_trains_and_is_tested(every):
    cells, folder = every
    assert len(cells) == len(METHODS) - 1
    for cell in cells:
        assert cell.metric is not None
        assert 0 <= cell.metric <= 1
        tokens = cell.selector.startswith("token_")
        assert cell.rows == 24 or (tokens and cell.rows > 24 * 10)
        share = 1 if cell.selector == "full" else 0.5
        assert cell.kept == int(cell.rows * share) or cell.selector in ("infobatch", "token_rho", "token_self_evolving")
        assert cell.training_flops > 0
        assert (cell.selection_flops > 0) == (METHODS[cell.selector].forwards != 0)
    assert len(list((folder / "cells" / "demo").iterdir())) == len(cells)


@pytest.mark.slow
def test_the_insight_of_a_cell_is_about_its_scores(every):
    cells, folder = every
    of = {cell.selector: cell for cell in cells}
    assert of["low_loss"].loss_correlation == pytest.approx(1)
    assert of["high_loss"].loss_correlation == pytest.approx(-1)
    assert of["longest"].length_correlation == pytest.approx(-1)
    assert of["low_loss"].auroc == pytest.approx(1 - of["high_loss"].auroc)
    assert of["random"].auroc is None
    data = make_data(config(folder, ["full"]), 0)
    losses = ScoreTable.load(folder / "scores" / "demo" / "loss-seed-0").column("score")
    kept = np.argsort(losses)[:12]
    assert of["low_loss"].wrong_kept == pytest.approx(data.wrong[kept].mean())
    assert of["full"].wrong_kept == pytest.approx(0.5)


@pytest.mark.slow
def test_flops_are_counted_from_parameters_and_tokens(every):
    cells, folder = every
    of = {cell.selector: cell for cell in cells}
    lengths = ScoreTable.load(folder / "scores" / "demo" / "length-seed-0").column("length")
    size = sum(parameter.numel() for parameter in load_weights(str(BASE), default_arguments()).parameters())
    assert of["full"].training_flops == pytest.approx(6 * size * lengths.sum())
    assert of["low_loss"].selection_flops == pytest.approx(2 * size * lengths.sum())


@pytest.mark.slow
def test_methods_that_share_scores_measure_once(every):
    _, folder = every
    names = {path.name for path in (folder / "scores" / "demo").iterdir()}
    assert "resonance-seed-0" in names
    assert not [name for name in names if name.startswith("resonance_and_loss")]


@pytest.mark.slow
def test_finished_work_is_not_repeated(tmp_path, monkeypatch):
    first = config(tmp_path, ["random", "low_loss", "resonance"])
    trained = []
    own = SFTTrainer.train

    def train(self, *args, **kwargs):
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(first)
    cells = tmp_path / "out" / "cells" / "demo"
    before = {path.name: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert len(before) == 2
    found = run(first)
    assert len(trained) == 4
    assert [cell.selector for cell in found] == ["random", "low_loss", "resonance"]
    assert {name: (cells / name).stat().st_mtime_ns for name in before} == before
    more = run(config(tmp_path, ["random", "low_loss", "resonance", "shortest"]))
    assert len(trained) == 5
    assert more[:3] == found


@pytest.mark.slow
def test_tokens_are_selected_as_the_settings_say(every):
    cells, folder = every
    of = {cell.selector: cell for cell in cells}
    assert of["token_fixed"].rows == of["token_rho"].rows == of["token_self_evolving"].rows
    scores = TokenScores.load(folder / "scores" / "demo" / "token_losses-seed-0")
    assert of["token_fixed"].rows == len(scores.base)
    kept = keep_globally(scores.base, scores.reference, 0.5)
    wrong = make_data(config(folder, ["full"]), 0).wrong[np.repeat(scores.sample_id, scores.num_tokens)]
    assert of["token_fixed"].wrong_kept == pytest.approx(wrong[kept].mean())
    assert of["token_rho"].kept == keep_by_sample(scores.base, scores.reference, scores.offsets, 0.5).sum()
    assert of["token_self_evolving"].kept > of["token_fixed"].kept  # the first stage learns all tokens
    assert of["token_self_evolving"].wrong_kept is None


@pytest.mark.slow
def test_a_given_reference_model_is_not_tuned(tmp_path):
    (cell,) = run(config(tmp_path, ["token_fixed"], reference_model=str(BASE)))
    folder = tmp_path / "out" / "scores" / "demo" / "token_losses-seed-0"
    scores = TokenScores.load(folder)
    assert np.array_equal(scores.base, scores.reference)
    assert not (folder / "reference").exists()
    (own,) = run(config(tmp_path / "own", ["token_fixed"]))
    assert own.selection_flops > cell.selection_flops


@pytest.mark.slow
def test_at_equal_flops_everything_costs_as_much_as_all_rows(tmp_path):
    names = ["full", "random", "low_loss", "infobatch", "token_self_evolving", "nuggets"]
    training = {**SMALL["training"], "num_train_epochs": 2, "per_device_train_batch_size": 1}
    cells = run(config(tmp_path, names, equal_flops=True, training=training))
    budget = cells[0].training_flops
    longer = {cell.selector: cell for cell in cells if cell.budget == "flops"}
    shorter = {cell.selector: cell for cell in cells if cell.budget == "epochs"}
    assert set(longer) == set(names) - {"full"}
    for name in ("random", "low_loss", "infobatch", "token_self_evolving"):
        cell = longer[name]
        assert cell.training_flops + cell.selection_flops == pytest.approx(budget, rel=0.15), name
    assert longer["random"].training_flops > 1.5 * shorter["random"].training_flops
    assert longer["nuggets"].metric is None
    assert longer["nuggets"].failure == "selecting alone costs more than training on all rows"
    assert shorter["nuggets"].metric is not None


@pytest.mark.slow
def test_infobatch_trains_on_all_rows_in_the_last_eighth(tmp_path):
    training = {**SMALL["training"], "num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-5}
    shares = []
    own = choosing.Chosen.decided

    def decided(self, epochs):
        shares.extend(each.keep.mean() for each in self.callback.selections)
        return own(self, epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing.Chosen, "decided", decided)
        run(config(tmp_path, ["infobatch"], training=training))
    assert len(shares) == 8
    assert shares[0] == shares[-1] == 1
    assert all(share < 1 for share in shares[1:-1])


@pytest.mark.slow
def test_tasks_of_the_harness_are_the_metric(tmp_path, own_rows):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_tasks(tmp_path)
    settings = {"dataset": own_rows, "prompt_column": "q", "completion_column": "a", "task_folder": str(folder)}
    (cell,) = run(config(tmp_path, ["random"], tasks=["sums", "choices"], **settings))
    assert set(cell.tasks) == {"sums", "choices"}
    assert cell.metric == pytest.approx(np.mean(list(cell.tasks.values())))


@pytest.mark.slow
def test_a_comparison_is_reproducible(tmp_path):
    def numbers(folder):
        (cell,) = run(config(folder, ["resonance"]))
        return cell.metric, cell.kept, cell.auroc, cell.length_correlation

    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_another_comparison_in_the_folder_is_refused(tmp_path):
    run(config(tmp_path, ["random"]))
    with pytest.raises(InputError, match=r"max_new_tokens \(8 / 9\)"):
        run(config(tmp_path, ["random"], max_new_tokens=9))


@pytest.mark.parametrize(
    ("rate", "clip"),
    [pytest.param(1e30, 0.0, marks=pytest.mark.slow), (10.0, 1.0)],  # the loss is NaN, and the loss is finite
)
def test_a_training_that_diverges_is_reported_and_not_averaged(rate, clip, tmp_path):
    training = {**SMALL["training"], "learning_rate": rate, "max_grad_norm": clip, "per_device_train_batch_size": 2}
    (cell,) = run(config(tmp_path, ["random"], training=training))
    assert cell.metric is None
    assert cell.failure.startswith("diverged: the loss is ")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_reported_and_do_not_end_the_comparison(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise NotFiniteError("Row 3 has a loss that is not finite.")

    monkeypatch.setitem(METHODS, "high_loss", dataclasses.replace(METHODS["high_loss"], scores="broken", score=broken))
    low, random = run(config(tmp_path, ["high_loss", "random"]))
    assert low.metric is None
    assert low.failure == "diverged: Row 3 has a loss that is not finite."
    assert random.metric is not None


def test_another_model_with_the_same_name_is_refused(tmp_path, tiny_model_dir, own_rows):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    training = {**SMALL["training"], "activation_checkpointing": False}
    settings = {"dataset": own_rows, "model": str(folder), "training": training, **OWN}
    run(config(tmp_path, ["random"], **settings))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    selector_scores.hash_weights.cache_clear()
    with pytest.raises(InputError, match="has a cell that was made from something else: they differ in weights "):
        run(config(tmp_path, ["random"], **settings))


def test_settings_that_only_other_selectors_need_may_be_added_later(tmp_path, own_rows):
    (first,) = run(config(tmp_path, ["random"], dataset=own_rows, **OWN))
    later = {"reference_model": str(BASE), "validation_rows": 3, "unsafe_code": False}
    assert run(config(tmp_path, ["random"], dataset=own_rows, **OWN, **later)) == [first]


def test_settings_that_cannot_work_write_nothing(tmp_path):
    with pytest.raises(InputError, match="'speed' is not a field of SFTConfig"):
        run(config(tmp_path, ["random"], training={"speed": 3}))
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_damaged_cell_is_named(tmp_path):
    run(config(tmp_path, ["random"]))
    path = tmp_path / "out" / "cells" / "demo" / "random-0.5-0.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(InputError, match=r"random-0.5-0.json' is damaged"):
        run(config(tmp_path, ["random"]))


OWN = {"prompt_column": "q", "completion_column": "a", "test_dataset": "tests.jsonl"}


@pytest.mark.parametrize("kind", [pytest.param("jsonl", marks=pytest.mark.slow), "csv"])
def test_rows_and_scores_of_ones_own(kind, tmp_path, own_rows):
    if kind == "csv":  # numbers are text
        Dataset.from_json(own_rows).to_csv("rows.csv")
        own_rows = "rows.csv"
    selectors = [{"score_column": "quality"}, {"score_column": "quality", "name": "worst", "drop": "largest"}]
    best, worst = run(config(tmp_path, selectors, dataset=own_rows, wrong_column="bad", **OWN))
    assert best.rows == 12
    scores = ScoreTable.load(tmp_path / "out" / "scores" / "demo" / "column-quality")
    assert scores.column("score").tolist() == list(range(12))
    assert best.auroc == pytest.approx(1 - worst.auroc)
    assert best.wrong_kept == pytest.approx(0.5)


def test_held_out_rows_that_are_also_in_the_dataset_are_counted(tmp_path, own_rows):
    known = {"q": "what is 3 + 1 ?\n", "a": "3+1=5. #### 5"}
    tests = [known, *({"q": f"what is {i} + 2 ?\n", "a": f"#### {i + 2}"} for i in range(3))]
    Dataset.from_list(tests).to_json(tmp_path / "tests.jsonl")
    with pytest.warns(UserWarning, match="1 of the 4 held-out rows are also in the dataset"):
        make_data(config(tmp_path, ["random"], dataset=own_rows, **OWN), 0)


@pytest.mark.slow
def test_a_small_model_scores_for_superfiltering(tmp_path, own_rows, tiny_model_dir):
    settings = {"dataset": own_rows, "proxy_model": str(tiny_model_dir), **OWN}
    run(config(tmp_path, ["superfiltering", "ifd"], **settings))
    folder = tmp_path / "out" / "scores"
    proxy, own = (ScoreTable.load(folder / name / "ifd") for name in (slug(str(tiny_model_dir)), "demo"))
    assert proxy.provenance.weights != own.provenance.weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selectors": ["beauty"]}, "There is no method 'beauty'. There are: full, random"),
        ({"selectors": ["superfiltering"]}, "name one as proxy_model"),
        ({"selectors": ["less"], "dataset": "rows.jsonl"}, "'less' selects for a validation set"),
        ({"selectors": ["nuggets"], "dataset": "rows.jsonl"}, "'nuggets' selects for a validation set"),
        ({"selectors": [{"method": "less", "settings": {"r": 3}}]}, "'less' has no setting 'r'"),
        ({"selectors": [{"method": "less", "settings": {"share": 0}}]}, "share of the rows"),
        ({"selectors": [{"method": "less", "settings": {"lora_r": 2.5}}]}, "lora_r must be a whole number"),
        ({"selectors": [{"method": "longest", "score_model": "x"}]}, "cannot use a score_model"),
        ({"selectors": [{"method": "infobatch", "score_model": "x"}]}, "cannot use a score_model"),
        ({"selectors": [{"method": "ifd", "settings": {"lora_r": 3}}]}, "'ifd' has no setting 'lora_r'"),
        ({"selectors": ["random"], "training": {"speed": 3}}, "'speed' is not a field of SFTConfig"),
        ({"selectors": ["random"], "training": {"lr_scheduler_type": "x"}}, "SFTConfig refuses"),
        (
            {"selectors": ["random"], "training": {"learning_rate": "fast"}},
            "learning_rate must be a finite number, got",
        ),
        ({"selectors": ["random"], "training": {"eval_strategy": "epoch"}}, "leave eval_strategy out"),
        (
            {"selectors": ["random"], "training": {"num_train_epochs": 0}},
            "num_train_epochs must be a finite number above 0",
        ),
        ({"selectors": [{"score_column": "quality"}]}, "The demo's problems have no column 'quality'"),
        ({"selectors": ["random"], "model": "./none"}, "none'"),
        ({"selectors": ["random"], "dataset": "./none.jsonl"}, "There is no dataset"),
    ],
)
def test_what_cannot_work_is_refused(changes, message, tmp_path):
    selectors = changes.pop("selectors")
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, selectors, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrong_column": "none"}, "no column 'none'"),
        ({"selectors": [{"score_column": "none"}]}, "no column 'none'"),
        ({"selectors": [{"score_column": "a"}]}, "must hold numbers only: row 0 has '0"),
        ({"wrong_column": "a"}, "must be true or false, or 1 or 0, in each row"),
        ({"wrong_column": "quality"}, "must be true or false, or 1 or 0, in each row"),
        ({"test_dataset": None}, "12 of the 12 held-out rows are also in the dataset"),
        ({"test_dataset": "unmarked.jsonl"}, "Held-out row 1 does not end in a number"),
    ],
)
def test_columns_that_cannot_work_are_refused(changes, message, tmp_path, own_rows):
    changes = {"selectors": ["random"], "dataset": own_rows, **OWN, **changes}
    Dataset.from_list([{"q": "1+1", "a": "#### 2"}, {"q": "why", "a": "so"}]).to_json(tmp_path / "unmarked.jsonl")
    with pytest.raises(InputError, match=message):
        run(config(tmp_path, **changes))


def test_a_name_that_means_another_selector_now_is_refused(tmp_path, own_rows):
    run(config(tmp_path, [{"score_column": "quality", "name": "mine"}], dataset=own_rows, **OWN))
    with pytest.raises(InputError, match=r"they differ in selector.drop \(smallest / largest\)"):
        run(config(tmp_path, [{"score_column": "quality", "name": "mine", "drop": "largest"}], dataset=own_rows, **OWN))


def test_a_prompt_of_two_columns(tmp_path, own_rows):
    rows = [
        {**row, "more": f"{i} times" if i % 2 else ""} for i, row in enumerate(Dataset.from_json(own_rows).to_list())
    ]
    Dataset.from_list(rows).to_json(tmp_path / own_rows)
    Dataset.from_list([{"q": "1 + 1", "more": "", "a": "#### 2"}]).to_json(tmp_path / "tests.jsonl")
    settings = {**OWN, "prompt_column": ["q", "more"]}
    data = make_data(config(tmp_path, ["random"], dataset=own_rows, **settings), 0)
    assert [data.rows["prompt"][row] for row in (0, 1)] == [rows[0]["q"], f"{rows[1]['q']}\n\n1 times\n"]


def test_rows_that_changed_since_are_refused(tmp_path, own_rows):
    run(config(tmp_path, ["random"], dataset=own_rows, **OWN))
    rows = Dataset.from_json(own_rows).to_list()
    Dataset.from_list([*rows[:-1], {**rows[-1], "a": "#### 7"}]).to_json(tmp_path / own_rows)
    with pytest.raises(InputError, match="they differ in data "):
        run(config(tmp_path, ["random"], dataset=own_rows, **OWN))


@pytest.mark.slow
def test_a_score_column_may_have_the_name_of_a_criterion(tmp_path, own_rows):
    rows = [{**row, "loss": row["quality"]} for row in Dataset.from_json(own_rows).to_list()]
    Dataset.from_list(rows).to_json(tmp_path / own_rows)
    cells = run(config(tmp_path, [{"score_column": "loss", "name": "mine"}, "low_loss"], dataset=own_rows, **OWN))
    assert [cell.selector for cell in cells] == ["mine", "low_loss"]
    assert abs(cells[0].loss_correlation) < 1


@pytest.mark.slow
def test_a_score_column_may_be_added_later(tmp_path, own_rows):
    (first,) = run(config(tmp_path, ["random"], dataset=own_rows, **OWN))
    both = run(config(tmp_path, ["random", {"score_column": "quality"}], dataset=own_rows, **OWN))
    assert both[0] == first


def test_a_tokenizer_without_a_pad_token_works(tmp_path, own_rows, tiny_model_dir):
    folder = tmp_path / "padless"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    training = {**SMALL["training"], "activation_checkpointing": False}
    (cell,) = run(config(tmp_path, ["random"], dataset=own_rows, model=str(folder), training=training, **OWN))
    assert cell.metric is not None


def test_validation_rows_that_are_held_out_are_refused(tmp_path, own_rows):
    with pytest.raises(InputError, match="would select for the test"):
        run(config(tmp_path, ["nuggets"], dataset=own_rows, **OWN, validation_dataset="tests.jsonl"))


def test_empty_rows_are_left_out(tmp_path, own_rows):
    rows = [*Dataset.from_json(own_rows).to_list(), {"q": "why ?", "a": "", "bad": 1, "quality": 3}]
    Dataset.from_list(rows).to_json(tmp_path / own_rows)
    (cell,) = run(config(tmp_path, ["full"], dataset=own_rows, **OWN))
    assert (cell.rows, cell.kept) == (13, 12)


@pytest.mark.slow
def test_selecting_costs_what_the_scoring_model_costs(tmp_path, own_rows, tiny_model_dir, tiny_llama):
    settings = {"dataset": own_rows, "proxy_model": str(tiny_model_dir), **OWN}
    proxy, own = run(config(tmp_path, ["superfiltering", "ifd"], **settings))
    lengths = ScoreTable.load(tmp_path / "out" / "scores" / slug(str(tiny_model_dir)) / "ifd").column("length")
    assert proxy.selection_flops == pytest.approx(2 * 2 * parameters_of(tiny_llama()) * lengths.sum())
    assert own.training_flops == pytest.approx(proxy.training_flops, rel=0.2)  # the same model, as many rows


@pytest.mark.slow
def test_the_seconds_of_selecting_are_measured_again_if_they_were_lost(tmp_path):
    first = config(tmp_path, ["low_loss"])
    run(first)
    folder = tmp_path / "out" / "scores" / "demo" / "loss-seed-0"
    (folder / "cost.json").unlink()
    (tmp_path / "out" / "cells" / "demo" / "low_loss-0.5-0.json").unlink()
    (cell,) = run(first)
    assert cell.selection_seconds == json.loads((folder / "cost.json").read_text())["seconds"]


def test_the_seconds_of_an_interrupted_pass_count_and_its_parts_are_kept(tmp_path):
    folder, done = tmp_path / "scores", []

    def work() -> int:
        done.append((folder / "parts").exists())
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        path = folder / "parts" / str(len(done))
        path.touch()
        os.utime(path, (time.time() + 100, time.time() + 100))  # as if the work had taken that long
        if len(done) < 3:
            raise KeyboardInterrupt
        return 7

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            timed(folder, work, resumes=True)
        for path in folder.rglob("parts/*"):
            os.utime(path, (time.time() + 100, time.time() + 100))
    value, seconds = timed(folder, work, resumes=True)
    assert (value, done) == (7, [False, True, True])
    assert 190 < seconds < 320
    assert timed(folder, lambda: 8, resumes=True) == (8, seconds)
    assert not (folder / "attempt.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"seconds": "long"}'])
def test_a_damaged_file_with_the_seconds_is_named(tmp_path, text):
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(InputError, match=r"cost.json' is damaged.*Remove '.*', and the work is done again\.$"):
        timed(tmp_path, lambda: 7, resumes=True)


def test_what_does_not_resume_starts_again_in_an_empty_folder(tmp_path):
    folder = tmp_path / "scores"

    def work() -> None:
        assert [path.name for path in folder.iterdir()] == ["attempt.json"]
        (folder / "half").touch()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            timed(folder, work, resumes=False)


@pytest.mark.slow
def test_an_interrupted_pass_resumes(tmp_path, monkeypatch):
    real, measured = passes._Results.add, []

    def add(self, number, lines) -> None:
        real(self, number, lines)
        self.save()
        measured.append(number)
        if len(measured) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes._Results, "add", add)
    stop = None
    (undisturbed,) = run(config(tmp_path / "whole", ["resonance"]))
    batches, stop = len(measured), 2
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path, ["resonance"]))
    (cell,) = run(config(tmp_path, ["resonance"]))
    assert len(measured) == batches > 2  # none twice
    assert (cell.metric, cell.auroc) == (undisturbed.metric, undisturbed.auroc)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    precious = tmp_path / "out" / "trainer" / "mine.txt"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(InputError, match=r"has a folder 'trainer', but no settings\.json of"):
        run(config(tmp_path, ["random"]))
    assert precious.exists()


@pytest.mark.slow
def test_a_table_of_transfer(tmp_path, own_rows, tiny_model_dir, capsys):
    other = str(tiny_model_dir)
    selectors = ["random", "low_loss", {"method": "low_loss", "score_model": other}]
    training = {**SMALL["training"], "use_cpu": True, "activation_checkpointing": False}
    settings = {"dataset": own_rows, "model": ["demo", other], "training": training, **OWN}
    mine = config(tmp_path, selectors, **settings)
    cells = run(mine)
    pairs = {(cell.method, cell.scored_by, cell.model) for cell in cells if cell.selector != "random"}
    assert pairs == {("low_loss", "demo", "demo"), ("low_loss", other, other), ("low_loss", other, "demo")}
    own, theirs = (ScoreTable.load(tmp_path / "out" / "scores" / slug(name) / "loss") for name in ("demo", other))
    assert own.provenance.weights != theirs.provenance.weights
    text = write(mine, cells, {each.name: METHODS[each.method].needs for each in mine.selectors})
    assert "low_loss, keep 0.5: over random, by the model that scored and the model that was trained" in text
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["transfer"]
    assert {(each["scored_by"], each["model"]) for each in found} == {("demo", "demo"), (other, other), (other, "demo")}


@pytest.mark.slow
def test_with_max_steps_the_tokens_seen_are_counted(tmp_path):
    training = {**SMALL["training"], "max_steps": 1, "per_device_train_batch_size": 4}
    full, half = run(config(tmp_path, ["full", "random"], training=training))
    assert 0 < half.training_flops < 2 * full.training_flops
    (whole,) = run(config(tmp_path / "whole", ["full"]))
    assert full.training_flops < whole.training_flops / 3


def test_from_the_shell(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(json.dumps({**SMALL, "selectors": ["full", "low_loss"]}))
    main(["compare", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "demo: low_loss keep 0.5 seed 0:" in out
    assert "over random" in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [line["selector"] for line in found["lines"]] == ["full", "low_loss"]
    assert found["lines"][0]["metric_low"] is None  # one seed has no interval
    assert len(found["cells"]) == 2
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [[], ["c.yaml", "--published"]])
def test_exactly_one_thing_is_compared(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    assert "Say what to compare" in capsys.readouterr().err


def test_the_surveys_ranks_from_the_shell(tmp_path, capsys):
    main(["compare", "--published", "--json", str(tmp_path / "ranks.json")])
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    assert {"method": "IFD", "efficiency_rank": 1, "feasibility_rank": 4} in ranks
    assert "AlpaGasus" in capsys.readouterr().out


def test_parameters_leave_out_an_input_embedding_that_is_not_the_head(tiny_llama):
    model = tiny_llama()
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_of(model) == whole - model.get_input_embeddings().weight.numel()

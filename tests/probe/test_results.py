"""Results as files: whole, read again, refused when damaged; the settings file, the table, the page."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.probes import record, result

from resofilter_trainer import InputError, ProbeResult
from resofilter_trainer.probe.findings import ALL, LABELLED, SELF_MADE
from resofilter_trainer.probe.page import colour_of, page_of, write_probe
from resofilter_trainer.probe.recommendation import Recommendation
from resofilter_trainer.probe.recommended import settings_text
from resofilter_trainer.probe.table import WIDTH, table_of

FIELDS = {"signal", "kind", "auroc", "low", "high", "auroc_length_out", "auroc_within_prompt", "seconds"}


def test_what_is_saved_is_read_again(tmp_path):
    there = result()
    path = there.save(tmp_path / "probe")
    assert path == tmp_path / "probe" / "probe.json"
    assert [ProbeResult.load(each) for each in (path, path.parent)] == [there, there]
    content = json.loads(path.read_text())
    assert all(each.keys() >= FIELDS for each in content["signals"])
    assert content["signals"][2]["auroc"] is None
    assert content["recommendation"].keys() >= {"signal", "drop", "reason"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"signals": 3}', "null", '{"recommendation": {"signal": "a"}}'])
def test_anything_else_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(InputError, match=r"probe.json' is damaged"):
        ProbeResult.load(tmp_path)


def test_a_part_of_another_kind_is_refused(tmp_path):
    content = {**result().to_json(), "signals": [{"signal": "a"}]}
    (tmp_path / "probe.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged"):
        ProbeResult.load(tmp_path)


def test_a_folder_without_a_probe_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no probe at"):
        ProbeResult.load(tmp_path)


def test_a_console_shows_a_line_and_a_notebook_a_table():
    records = [record(name, ALL, value) for name, value in (("a", 0.9), ("<b>", 0.6))]
    found = result(records, recommendation=Recommendation("a", "largest", "Drop by a & more."))
    assert repr(found) == "ProbeResult(2 signals, 1 kinds of faults; drop the largest a)"
    assert "do not filter" in repr(result(records, recommendation=Recommendation(None, None, "Do not.")))
    shown = found._repr_html_()
    assert shown.count("<tr") == 3
    assert "&lt;b&gt;" in shown
    assert "Drop by a &amp; more." in shown
    assert "0.93" in shown  # the interval's end


def test_the_records_of_a_signal_and_the_order_of_signals_and_kinds():
    records = [record(name, kind, value) for kind in ("cut", SELF_MADE, ALL)
               for name, value in (("a", 0.6), ("b", 0.2), ("c", None))]  # fmt: skip
    found = result(records)
    assert found.ranked == ["b", "a", "c"]
    assert found.ordered_kinds == [SELF_MADE, ALL, "cut"]
    assert found.record("a", "cut")["auroc"] == 0.6
    with pytest.raises(InputError, match="no record of signal 'z'"):
        found.record("z")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (
            [record("entropy", LABELLED, 0.8)],
            {"score": {"signals": ["entropy"]}, "select": {"by": ["entropy"], "drop": "largest", "keep": 0.5}},
        ),
        ([record("loss", LABELLED, 0.2)], {"select": {"by": ["loss"], "drop": "smallest", "keep": 0.5}}),
        (
            [record("rank", LABELLED, 0.6, length_out=0.8)],
            {
                "score": {"signals": ["rank"]},
                "select": {"by": ["rank", "num_tokens"], "combine": "residual", "drop": "largest", "keep": 0.5},
            },
        ),
        ([record("rank", LABELLED, 0.5)], {"select": {"keep": 1.0}}),
    ],
)
def test_the_settings_file_says_what_is_recommended(records, expected):
    found = result(records, provenance={"model": "a\nkeep: 0.1", "dataset": "d"})
    text = settings_text(found.recommendation, found.provenance)
    assert yaml.safe_load(text) == expected
    assert found.recommendation.reason.split(" ")[0] in text
    assert max(map(len, text.split("\n"))) <= 120


WARM = {"model": "m", "dataset": "d", "reference": "small/model", "warmup_rows": 64, "warmup_method": "lora"}
WARM |= {"warmup_lr": 1e-3, "warmup_epochs": 2, "warmup_batch_size": 8, "warmup_lora_rank": 16, "warmup_seed": 0}
FULL = {"warmup_method": "full", "warmup_lr": 1e-4, "warmup_epochs": 1}


@pytest.mark.parametrize(
    ("signal", "warmup", "changes", "expected"),
    [
        ("excess", None, {}, {"signals": ["excess"], "reference": "small/model"}),
        (
            "loss",
            64,
            {},
            {"warmup": 64, "warmup_method": "lora", "warmup_lr": 1e-3, "warmup_epochs": 2},
        ),
        ("rank", 64, FULL, {"signals": ["rank"], "warmup": 64}),
        ("rank", 0, FULL | {"warmup_rows": None, "warmup_dataset": "a hash"}, {"signals": ["rank"]}),
    ],
)  # fmt: skip
def test_the_settings_file_has_what_the_signal_needs(signal, warmup, changes, expected):
    text = settings_text(Recommendation(signal, "largest", "It does.", warmup=warmup), WARM | changes)
    assert yaml.safe_load(text)["score"] == expected
    assert ("the same warmup_dataset" in text) == ("warmup_dataset" in changes)


def test_the_table_fits_and_has_every_number():
    kinds = ["exchanged", "number_carried", "repeated_prompt", *(f"kind_number_{i}" for i in range(12)), ALL]
    signals = {"resonance_sgd": 0.5, "loss": 0.51, "embedding_chain": 0.52}
    records = [record(name, kind, auroc, length_out=0.62) for kind in kinds for name, auroc in signals.items()]
    found = result(records, notes=["word " * 60])
    text = table_of(found)
    assert max(map(len, text.split("\n"))) <= WIDTH
    line = next(line for line in text.split("\n") if line.startswith("embedding_chain"))
    assert line.split()[1:6] == [".52", "[.49,", ".55]", ".62", "-"]
    assert all(f"{kind}: what {kind} stands for" in text for kind in kinds)
    assert "number is left out: no row has a number." in text
    assert text.endswith("\n  ".join(text.split("Recommendation: ")[1].split("\n  ")))
    assert sum(line.startswith("loss ") for line in text.split("\n")) == text.count("\nsignal")


def test_the_table_of_labels_alone():
    text = table_of(result([record("loss", LABELLED, 1.0), record("loss", ALL, 1.0)]))
    assert "1.00 [.97, 1.03]" in text


def test_the_page_escapes_text_and_needs_no_network(tmp_path):
    found = result(provenance={"model": "<script>x</script>", "dataset": "d"})
    write_probe(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "a &lt;b&gt;note&lt;/b&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert found.recommendation.reason in page
    assert ".90" in page
    assert "[.87, .93]" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probe.json", "recommended.yaml", "report.html"]
    assert page_of(ProbeResult.load(tmp_path)) == page


def test_colours_are_white_at_chance_and_full_at_either_end():
    assert colour_of(0.5, 0.5) == colour_of(None, 0.5) == "rgb(255, 255, 255)"
    assert colour_of(1.0, 0.5) == "rgb(230, 140, 60)"
    assert colour_of(0.0, 0.5) == colour_of(-1.0, 0.0) == "rgb(90, 160, 220)"

"""The results of a comparison: one table, one picture, one JSON file. Knows cells and matplotlib, no models."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..io.files import replacing
from ..selecting.results import COMPARISON_FILE, EPOCHS, FLOPS, FULL, RANDOM, kept_share
from .cells import Cell, summarise, transfer
from .config import ComparisonConfig
from .published import Needs, dense_ranks, efficiency_ranks, feasibility_ranks, pir, pixel_distances, residual

PICTURE = "comparison.png"
OWN, BASELINE = "#0072b2", "#999999"  # distinct for colour-blind readers as well
NOTE = """metric: held-out, mean over seeds with its 95 % interval (Student's t); over random, over all: paired by seed.
SDF: kept / all. PIR: 3.1311 p - 1.6875, p the ratio to training on all rows. over line: PIR above the survey's line,
ranked in `efficiency`; `feasibility` ranks what a selector needs before it runs (arXiv 2406.14115). length, loss: rank
correlations with the order of dropping, so -1 where the longest rows, or those with the highest loss, are kept. Seconds
are this machine's."""
FLOOR = """The metric is at its floor: it is 0 in every training, and tells no selector from another. Train longer, take
a better model or an easier metric, or set loss_dataset, whose loss has no floor."""


def write(config: ComparisonConfig, cells: Sequence[Cell], needs: dict[str, Needs]) -> str:
    """Write the JSON file and the picture into the comparison's folder, and return the table.

    Args:
        config: the comparison.
        cells: all its cells.
        needs: what each selector needs before it runs, by the selector's name.
    """
    lines = judged(summarise(cells), needs)
    output = Path(config.output)
    found = {
        "settings": config.to_json(),
        "lines": lines,
        "transfer": [
            {"method": method, "keep": keep, "scored_by": scored_by, "model": model, "over_random": difference}
            for (method, keep), pairs in transfer(lines).items()
            for (scored_by, model), difference in pairs.items()
        ],
        "cells": [cell.to_json() for cell in cells],
    }
    with replacing(output / COMPARISON_FILE) as temporary:
        temporary.write_text(json.dumps(_plain(found), indent=2, default=str) + "\n")
    with replacing(output / PICTURE) as temporary:
        draw(lines, temporary)
    return table(lines)


def judged(lines: Sequence[dict[str, Any]], needs: dict[str, Needs]) -> list[dict[str, Any]]:
    """The lines with PIR, both measures of efficiency, and ranks among the lines of the same budget and trained model.

    PIR is None, and efficiency is left out, where nothing was trained on all rows.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["budget"], line["model"]), []).append(line)
    return [each for group in groups.values() for each in _judged(group, needs)]


def _judged(lines: Sequence[dict[str, Any]], needs: dict[str, Needs]) -> list[dict[str, Any]]:
    found = [{**line, "pir": None if line["p"] is None else pir(line["p"])} for line in lines]
    there = [line for line in found if line["pir"] is not None]
    points = [(line["sdf"], line["pir"]) for line in there]
    spread = all(len({point[axis] for point in points}) > 1 for axis in (0, 1))
    pixels: Sequence[float | None] = pixel_distances(points) if spread else [None] * len(points)
    for line, rank, distance in zip(there, efficiency_ranks(points), pixels, strict=True):
        line |= {"above_line": residual(line["sdf"], line["pir"]), "pixels": distance, "efficiency_rank": rank}
    for line, rank in zip(found, feasibility_ranks([needs[line["selector"]] for line in found]), strict=True):
        line["feasibility_rank"] = rank
    costs = [line["selection_flops"] + line["training_flops"] for line in found]
    for line, cost, rank in zip(found, costs, dense_ranks(costs), strict=True):
        line |= {"flops": cost, "cost_rank": rank, "seconds": line["selection_seconds"] + line["training_seconds"]}
    return found


COLUMNS = (
    ("keep", 6, lambda line: f"{line['keep']:g}"),
    ("metric", 22, lambda line: _interval((line["metric"], line["metric_low"], line["metric_high"]))),
    ("over random", 24, lambda line: _interval(line["over_random"], "+")),
    ("over all", 24, lambda line: _interval(line["over_full"], "+")),
    ("SDF", 6, lambda line: f"{line['sdf']:.2f}"),
    ("PIR", 7, lambda line: _number(line["pir"])),
    ("over line", 10, lambda line: _number(line.get("above_line"), "+")),
    ("efficiency", 11, lambda line: str(line.get("efficiency_rank", "-"))),
    ("feasibility", 12, lambda line: str(line["feasibility_rank"])),
    ("select s", 9, lambda line: f"{line['selection_seconds']:.1f}"),
    ("train s", 8, lambda line: f"{line['training_seconds']:.1f}"),
    ("GFLOPs", 9, lambda line: f"{line['flops'] / 1e9:.0f}"),
    ("length", 7, lambda line: _number(line["length_correlation"], "+", 2)),
    ("loss", 6, lambda line: _number(line["loss_correlation"], "+", 2)),
    ("AUROC", 7, lambda line: _number(line["auroc"])),
    ("wrong", 6, lambda line: _number(line["wrong_kept"], digits=2)),
)


HELD_OUT_LOSS = ("held-out loss", 22, lambda line: _interval(line.get("held_out_loss", (math.nan,) * 3)))
LOSS_NOTE = "held-out loss: nats per learnt token of loss_dataset, smaller is better; 95 % interval over seeds."
BUDGETS = {
    EPOCHS: "",
    FLOPS: "At equal FLOPs: selecting and training together cost as much as training on all rows.",
}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as text, a table for each budget."""
    shown = []
    for budget, title in BUDGETS.items():
        own = [line for line in lines if line["budget"] == budget]
        if own:
            shown += [*([title] if title else []), *_table(own), ""]
    notes = [NOTE, LOSS_NOTE] if _has_loss(lines) else [NOTE]
    trained = [line["metric"] for line in lines if line["seeds"]]
    notes += [FLOOR] if trained and not any(trained) else []
    return "\n".join([*shown, *notes, *_transfer_tables(lines)])


def _table(lines: Sequence[dict[str, Any]]) -> list[str]:
    names = [_name(line, lines) for line in lines]
    width = max(len("selector"), *map(len, names)) + 1
    columns = (*COLUMNS[:2], HELD_OUT_LOSS, *COLUMNS[2:]) if _has_loss(lines) else COLUMNS
    rows = ["selector".ljust(width) + "".join(title.rjust(size) for title, size, _ in columns)]
    for name, line in zip(names, lines, strict=True):
        rows.append(name.ljust(width) + "".join(show(line).rjust(size) for _, size, show in columns))
    for name, line in zip(names, lines, strict=True):
        for why, count in Counter(line["failures"]).items():
            rows.append(f"left out: {name} keep {line['keep']:g}, {count} run(s): {why}")
    return rows


def _has_loss(lines: Sequence[dict[str, Any]]) -> bool:
    return any("held_out_loss" in line for line in lines)


def _transfer_tables(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each method: the scoring models against the trained models."""
    rows = []
    for (method, keep), pairs in transfer(lines).items():
        scorers, trained = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
        width = max(len(name) for name in ("scored by", *scorers, *trained)) + 2
        rows += ["", f"{method}, keep {keep:g}: over random, by the model that scored and the model that was trained"]
        rows.append("scored by".ljust(width) + "".join(name.rjust(width) for name in trained))
        for scorer in scorers:
            row = [_number(pairs.get((scorer, model)), "+").rjust(width) for model in trained]
            rows.append(scorer.ljust(width) + "".join(row))
    return rows


def _name(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The selector's name, after the model's where several models are trained."""
    several = len({each["model"] for each in lines}) > 1
    return f"{line['model']}: {line['selector']}" if several else str(line["selector"])


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """For each budget and share, best first: the metric with its interval, and the cost of selecting and training.

    Selectors without a share to set have a panel of their own, which names the share that each kept.
    """
    pairs = {(line["budget"], line["keep"]) for line in lines if line["selector"] != FULL}
    panels = sorted(pairs) or [(EPOCHS, 1.0)]
    figure = Figure(figsize=(10, len(panels) * (1 + 0.28 * (len(lines) // len(panels) + 1))), layout="constrained")
    for (left, right), (budget, keep) in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        own = [line for line in lines if (line["budget"], line["keep"]) == (budget, keep) and line["selector"] != FULL]
        shown = [line for line in (*own, *(each for each in lines if each["selector"] == FULL)) if line["seeds"]]
        shown.sort(key=lambda line: line["metric"])
        places = range(len(shown))
        for place, line in zip(places, shown, strict=True):
            colour = BASELINE if line["selector"] in (FULL, RANDOM) else OWN
            if not math.isnan(line["metric_low"]):
                left.plot([line["metric_low"], line["metric_high"]], [place, place], color=colour, linewidth=2)
            left.plot(line["metric"], place, "o", color=colour)
        asked = f"keep {keep:g} of rows or tokens" if keep < 1 else "own share of rows or tokens"
        left.set(xlabel="held-out metric, 95 % interval", title=asked + ", equal FLOPs" * (budget == FLOPS))
        shares = [f" ({100 * kept_share(line):.0f} %)" if keep == 1 else "" for line in shown]
        left.set_yticks(places, [_name(line, lines) + share for line, share in zip(shown, shares, strict=True)])
        selecting = [line["selection_flops"] for line in shown]
        right.barh(places, selecting, color=OWN, label="selecting")
        training = [line["training_flops"] for line in shown]
        right.barh(places, training, left=selecting, color=BASELINE, label="training")
        right.set(xlabel="FLOPs, estimated")
        right.set_yticks(places, [""] * len(shown))
        right.legend()
    figure.savefig(path, dpi=120, format="png")


def _interval(found: Sequence[float], sign: str = "") -> str:
    mean, low, high = found
    if math.isnan(mean):
        return "-"
    return f"{mean:{sign}.3f}" if math.isnan(low) else f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _number(value: float | None, sign: str = "", digits: int = 3) -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _plain(value: Any) -> Any:
    """The value for JSON: None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""A run step by step, from its ledger: losses, spikes and their rows, rows' lives. Knows arrays, no page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ledger.ledger import Ledger
from ..ledger.spikes import spikes_of
from ..ledger.trajectories import READ, trajectories_of
from .columns import finite

MAX_POINTS = 500  # of a line
SPIKES, ROWS = 20, 5  # that are listed, at most
MAX_VISITS = 50  # of a row's life
Visit = tuple[int, int, float | None, float | None]  # epoch (counted from 1), step, loss, resonance


@dataclass(frozen=True)
class SpikeNumbers:
    """A step that stands out, see `Ledger.spikes`.

    Attributes:
        step, by, loss, loss_level, grad_norm, grad_norm_level: as there, None where not known.
        left_out: whether its update was left out.
        rows: the rows that explain it, as `sample_id`, `explains`, `loss` and `num_tokens`; the largest first.
    """

    step: int
    by: str
    loss: float | None
    loss_level: float | None
    grad_norm: float | None
    grad_norm_level: float | None
    left_out: bool
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Timeline:
    """The run by step.

    Attributes:
        steps: `step`, the first of those that a point is the mean of, `loss` and `grad_norm`.
        per_point: the number of steps that a point is the mean of.
        stand_out: for `loss` and `grad_norm`, the number of steps that stand out by it; for `any`, by one of them.
        spikes: the steps that stand out most, at most 20, the first step first.
        left_out: the steps whose update was left out, as far as the ledger says it.
        first, last: the steps of the ledger.
    """

    steps: list[dict[str, Any]]
    per_point: int
    stand_out: dict[str, int]
    spikes: list[SpikeNumbers]
    left_out: list[int]
    first: int
    last: int


def timeline_of(ledger: Ledger | None) -> Timeline | None:
    """The run by step, with the steps that stand out and those that were left out; None without a ledger."""
    if ledger is None:
        return None
    steps = ledger.steps()
    per_point = -(-len(steps) // MAX_POINTS)
    means = steps.groupby((steps["step"] - ledger.first) // per_point)[["loss", "grad_norm"]].mean()
    points = zip(range(ledger.first, ledger.last + 1, per_point), means["loss"], means["grad_norm"], strict=True)
    left_out = steps["step"][steps["left_out"].fillna(False).astype(bool)].tolist()
    by = [spike.by for spike in spikes_of(steps)]  # of all, without reading their rows
    stand_out = {"any": len(by), **{name: sum(name in each for each in by) for name in ("loss", "grad_norm")}}
    names = ("sample_id", "explains", "loss", "num_tokens")
    spikes = [
        SpikeNumbers(
            step=spike.step,
            by=spike.by.replace("grad_norm", "gradient norm"),
            loss=finite(spike.loss),
            loss_level=finite(spike.loss_level),
            grad_norm=finite(spike.grad_norm),
            grad_norm_level=finite(spike.grad_norm_level),
            left_out=spike.step in left_out,
            rows=[
                {name: finite(value) for name, value in line.items()}
                for line in spike.rows.head(ROWS)[[*names]].to_dict("records")
            ],
        )
        for spike in sorted(ledger.spikes(most=SPIKES), key=lambda each: each.step)
    ]
    found = [{"step": step, "loss": finite(loss), "grad_norm": finite(norm)} for step, loss, norm in points]
    return Timeline(found, per_point, stand_out, spikes, left_out, ledger.first, ledger.last)


def lives_of(ledger: Ledger | None, rows: Sequence[int]) -> list[list[Visit]] | None:
    """Every time that each of some rows was trained, at most 50 of each; None without a ledger."""
    if ledger is None:
        return None
    ids, found = np.array(rows, np.int64), [list[Visit]() for _ in rows]
    order, full = np.argsort(ids), np.full(len(ids), np.inf)  # the step from which on a row has enough
    layers = [name for name in ledger.columns if name.startswith("layer_")]
    for table in ledger.batches(["epoch", "sample_id", "loss", *layers]):
        own = table.filter(np.isin(table["sample_id"].to_numpy(), ids))
        place = order[np.searchsorted(ids, own["sample_id"].to_numpy(), sorter=order)]
        early = own["step"].to_numpy() < full[place]
        own, place = own.filter(early), place[early]
        moved_by = [own[name].to_numpy() for name in layers] or [np.full(len(own), np.nan)]
        lines = (own[name].to_pylist() for name in ("epoch", "step", "loss"))
        for at, epoch, step, loss, moved in zip(
            place.tolist(), *lines, np.mean(moved_by, axis=0).tolist(), strict=True
        ):
            found[at].append((epoch + 1, step, finite(loss), finite(moved)))
        for at in np.unique(place).tolist():
            found[at] = sorted(found[at], key=lambda visit: visit[1])[:MAX_VISITS]
            if len(found[at]) == MAX_VISITS:
                full[at] = found[at][-1][1]
    return found


def curves_of(ledger: Ledger | None, keep: np.ndarray) -> list[dict[str, Any]]:
    """What filtering did: the mean loss by epoch of the rows that the run kept, of those it dropped, of a random half.

    Args:
        ledger: the ledger; without one, or where all rows are kept, there is nothing to tell.
        keep: (N,) bool, the rows that were kept in the end.

    Returns:
        `epoch` (counted from 1), `rows`, the `loss`, and `count`, how many of them the epoch has trained.
    """
    if ledger is None or keep.all():
        return []
    loss = trajectories_of(ledger.batches(READ), len(keep)).loss
    half = np.random.default_rng(0).permutation(len(keep)) < len(keep) / 2
    found = []
    for epoch, column in enumerate(loss.T):
        for name, some in (("kept", keep), ("dropped", ~keep), ("random half", half)):
            own = column[some & np.isfinite(column)]
            if len(own):
                found.append({"epoch": epoch + 1, "rows": name, "loss": float(own.mean()), "count": len(own)})
    return found

"""The card of a filtered dataset: how it was made, from what, and the commands that reproduce it. Knows no model.

The licence is that of the source dataset: filtering does not change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import ColumnMapping
from ..scores.cards import (
    TAG,
    code,
    flags,
    is_hub_name,
    licence_lines,
    licence_of,
    measured,
    origin_lines,
    plain,
    score_options,
    scoring_commands,
    source_options,
)
from ..scores.provenance import Provenance
from ..scores.score_table import EMPTY, OF_GROUP, OF_PROMPT, SAME_PROMPT, count_reasons

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

LISTED = 10  # reasons to drop rows
SELECTS = {"keep", "drop", "threshold", "by", "combine", "stratify_by", "strata"}  # the settings of DataSelector
LATER_SELECTS = {"length_out", "band"}  # and those that it has only where they say something
PER_PROMPT = {"by", "drop", "keep"}  # the settings of OnePerPrompt


def make_card(
    provenance: Provenance,
    reasons: Sequence[str],
    kept: str,
    policy: Mapping[str, Any],
    licence: str | None = None,
    name: str | None = None,
    group_column: str | None = None,
    weight_column: str | None = None,
    folders: bool = False,
) -> DatasetCard:
    """The card of a filtered dataset.

    Args:
        provenance: the provenance of the scores.
        reasons: the reason of every row of the dataset.
        kept: the reason of the kept rows.
        policy: the settings of the policy that decided.
        licence: the licence of the source dataset; by default the one that `licence_of` finds.
        name: the name of the filtered dataset.
        group_column: the column whose groups each have their share, if any.
        weight_column: the column of the kept rows with their weights, if they do not count alike.
        folders: whether to name this machine's folders, so that the commands run as they are here.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    licence = licence or licence_of(provenance.source.get("dataset"))
    provenance = provenance if folders else provenance.without_folders()
    source = provenance.source.get("dataset")
    sources = [str(source)] if is_hub_name(source) else None
    data = DatasetCardData(license=licence, tags=[TAG], source_datasets=sources, pretty_name=name)
    count = sum(reason == kept for reason in reasons)
    lines = [
        f"# {plain(name or 'Filtered dataset')}",
        "",
        f"{count:,} of {len(reasons):,} rows of {code(source or 'a dataset')}, selected by `resofilter_trainer` "
        f"{plain(provenance.versions.get('resofilter_trainer', ''))}: {measured(provenance)}.",
        "",
        *(_weighing(weight_column) if weight_column else []),
        "| dropped rows | reason |",
        "|---|---|",
        *(f"| {n:,} | {plain(why)} |" for why, n in count_reasons((r for r in reasons if r != kept), LISTED)),
        "",
        "## How to reproduce it",
        "",
        *_how(commands_of(provenance, policy, reasons, group_column), policy),
        "",
        *origin_lines(provenance),
        *licence_lines(licence),
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _weighing(column: str) -> list[str]:
    text = f"The rows do not count alike: multiply each row's loss by its {code(column)}, in Python"
    return [f"{text} with `SampleWeights(dataset[{column!r}])`. Without, a training on them is biased.", ""]


def commands_of(
    provenance: Provenance, policy: Mapping[str, Any], reasons: Iterable[str], group_column: str | None
) -> list[str]:
    """The commands that repeat the selection; none if it was not made by the settings of `resofilter select`."""
    unique, by = set(reasons), policy.get("by")
    per_prompt = policy.keys() == PER_PROMPT and any(OF_PROMPT in reason for reason in unique)
    if not per_prompt and (policy.keys() - LATER_SELECTS != SELECTS or isinstance(policy["keep"], Mapping)):
        return []
    if group_column is None and not policy.get("stratify_by") and any(OF_GROUP in reason for reason in unique):
        return []
    score = score_options(provenance, any(reason.startswith(SAME_PROMPT) for reason in unique), EMPTY in unique)
    several = None if isinstance(by, str) or by is None else list(by)
    select = {
        **{name: policy.get(name) for name in ("keep", "drop", "threshold", "stratify_by", "length_out")},
        **({"keep": None, "per_prompt": policy["keep"]} if per_prompt else {}),
        "band": list(policy["band"]) if policy.get("band") else None,
        "by": ",".join(several) if several else by,
        "weights": list(by.values()) if isinstance(by, Mapping) else None,
        "combine": policy.get("combine") if several and not isinstance(by, Mapping) else None,
        "strata": policy["strata"] if policy.get("stratify_by") else None,
        "group_column": group_column,
        **({"checks": "checks", "checked": provenance.source["checks"]} if "checks" in provenance.source else {}),
        "output": "kept",
    }
    scoring = scoring_commands(score, provenance.source)
    if not scoring:
        return []
    found = [*scoring, f"resofilter select scores{flags(select)}"]
    if "checks" in provenance.source:
        names = dataclasses.fields(ColumnMapping)
        columns = {each.name: score[each.name] for each in names if each.name in score}
        check = {**source_options(provenance.source), **columns, "output": "checks"}
        found.insert(0, f"resofilter check{flags(check)}")
    return [] if any("\n" in command for command in found) else found


def _how(commands: Sequence[str], policy: Mapping[str, Any]) -> list[str]:
    """The commands as an indented block, which no name can break; without commands, the settings."""
    if commands:
        return [f"    {command}" for command in commands]
    where = "By `ResonanceCallback` in a training run" if "epoch" in policy else "In Python, by a policy"
    return [f"{where}, with these settings:", "", code(dict(policy))]

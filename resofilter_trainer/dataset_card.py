"""The card of a filtered dataset: how it was made, from what, and the commands that make it again. Knows no model.

The licence is that of the dataset it was made from: a filter changes nothing about it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import RESONANCE, ColumnMapping, ResonanceConfig
from .scores import EMPTY, SAME_PROMPT, Provenance

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

LISTED = 10  # reasons


def make_card(
    provenance: Provenance,
    reasons: Sequence[str],
    kept: str,
    policy: Mapping[str, Any],
    licence: str | None = None,
    name: str | None = None,
) -> DatasetCard:
    """The card.

    Args:
        provenance: of the scores.
        reasons: of every row of the dataset.
        kept: the reason of rows that stay.
        policy: the settings that decided.
        licence: of the dataset that was filtered, where the caller knows it; else what `licence_of` finds.
        name: of the filtered dataset.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    source = provenance.source.get("dataset")
    licence = licence or licence_of(source)
    on_hub = isinstance(source, str) and not Path(source).exists() and source.count("/") == 1
    sources = [str(source)] if on_hub else None
    data = DatasetCardData(license=licence, tags=["resofilter"], source_datasets=sources, pretty_name=name)
    stay = sum(reason == kept for reason in reasons)
    gone = Counter(reason for reason in reasons if reason != kept).most_common(LISTED)
    commands = commands_of(provenance, policy, reasons)
    lines = [
        f"# {_plain(name or 'Filtered dataset')}",
        "",
        f"{stay:,} of {len(reasons):,} rows of {_code(source or 'a dataset')}, chosen by `resofilter_trainer` "
        f"{_plain(provenance.versions.get('resofilter_trainer', ''))}: {_measured(provenance)}.",
        "",
        "| rows that went | because |",
        "|---|---|",
        *(f"| {count:,} | {_plain(reason)} |" for reason, count in gone),
        "",
        "## How to make it again",
        "",
        *(["```", *commands, "```"] if commands else ["By `ResonanceCallback` in a training run:", "", _code(policy)]),
        "",
        "## Where the scores come from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_code(value)} |" for name, value in _origin(provenance)),
        "",
        f"Licence: {_plain(licence)}, that of the source." if licence else "Licence: that of the source; look there.",
        "",
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def licence_of(source: Any) -> str | None:
    """The licence that a dataset's own card names: in its folder, or on the hub; None where there is none to be had."""
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(source, str) or not source:
        return None
    path = Path(source)
    own = path / "README.md" if path.is_dir() else path.parent / "README.md"
    try:
        if path.exists():
            return None if not own.is_file() else DatasetCard.load(own).data.to_dict().get("license")
        return DatasetCard.load(source).data.to_dict().get("license")
    except (OSError, ValueError, HfHubHTTPError):  # no network, no such card, or one without a header
        return None


def commands_of(provenance: Provenance, policy: Mapping[str, Any], reasons: Iterable[str]) -> list[str]:
    """The two commands that score and select again; none where a training run decided."""
    if "by" not in policy:
        return []
    score = {"model": provenance.model, **_source(provenance.source), **_measure(provenance), **_rows(provenance)}
    there = set(reasons)
    score |= {
        "drop_duplicates": any(reason.startswith(SAME_PROMPT) for reason in there),
        "drop_empty": EMPTY in there,
        "output": "scores",
    }
    keep = policy.get("keep")
    by = policy["by"]
    select = {
        "keep": keep if not isinstance(keep, Mapping) else None,
        "drop": policy.get("drop"),
        "threshold": policy.get("threshold"),
        "by": by if isinstance(by, str) else ",".join(by),
        "combine": None if isinstance(by, str) else policy.get("combine"),
        "stratify_by": policy.get("stratify_by"),
        "strata": policy.get("strata") if policy.get("stratify_by") else None,
        "output": "kept",
    }
    return [f"resofilter score{_flags(score)}", f"resofilter select scores{_flags(select)}"]


def _measure(provenance: Provenance) -> dict[str, Any]:
    """What was measured, where it is not the default."""
    config = provenance.config
    if "criterion" in config:
        return {"criterion": config["criterion"]}
    return {
        each.name: config[each.name]
        for each in dataclasses.fields(ResonanceConfig)
        if each.name in config and config[each.name] != each.default
    }


def _rows(provenance: Provenance) -> dict[str, Any]:
    """Which columns, and how they became tokens, where it is not the default."""
    preparation = provenance.preparation
    defaults: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(ColumnMapping)}
    defaults |= {"prompt_column": [], "max_length": 1024, "assistant_only_loss": False, "completion_only_loss": None}
    found = {name: preparation[name] for name in defaults if name in preparation}
    found = {name: value for name, value in found.items() if value != defaults[name]}
    if "max_length" in found and found["max_length"] is None:
        found["max_length"] = "none"
    autocast = preparation.get("autocast")
    return found | ({} if autocast in (None, "auto") else {"precision": autocast})


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    split = source.get("split")
    return {
        "dataset": source.get("dataset"),
        "split": None if split == "train" else split,
        "dataset_config": source.get("name"),
    }


def _flags(values: Mapping[str, Any]) -> str:
    parts = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        many = value if isinstance(value, list) else [] if value is True else [value]
        parts += [f"--{name}={shlex.quote(str(many[0]))}"] if len(many) == 1 else [f"--{name}", *map(_quoted, many)]
    return "".join(f" {part}" for part in parts)


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _measured(provenance: Provenance) -> str:
    config = provenance.config
    if "criterion" in config and config["criterion"] != RESONANCE:
        return f"scored by {_code(config['criterion'])}"
    return "by how far training on each would move the up-projection weights (ResoFilter, arXiv 2412.14809)"


def _origin(provenance: Provenance) -> list[tuple[str, Any]]:
    """The provenance, line by line."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return [
        ("model", provenance.model),
        ("weights", provenance.weights),
        ("tokenizer", provenance.tokenizer),
        ("tokens and labels", provenance.dataset),
        ("settings", dict(provenance.config)),
        ("versions", versions),
        *([] if provenance.trust is None else [("trust", provenance.trust)]),
    ]


def _plain(value: object) -> str:
    """On one line, and nothing in it is a table, a link or markup."""
    text = " ".join(str(value).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in text)


def _code(value: object) -> str:
    """As code, on one line."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"

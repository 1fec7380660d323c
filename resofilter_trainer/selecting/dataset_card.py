"""The card of a filtered dataset: how it was made, from what, and the commands that reproduce it. Knows no model.

The licence is that of the source dataset: filtering does not change it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import FILE_FORMATS, RESONANCE, ColumnMapping, ResonanceConfig
from ..scores.provenance import Provenance
from ..scores.score_table import EMPTY, OF_GROUP, OF_PROMPT, SAME_PROMPT, count_reasons

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

LISTED = 10  # reasons to drop rows
PATIENCE = 3  # seconds to wait for the Hub, which is only asked for a licence
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
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    source = provenance.source.get("dataset")
    licence = licence or licence_of(source)
    sources = [str(source)] if _on_hub(source) else None
    data = DatasetCardData(license=licence, tags=["resofilter"], source_datasets=sources, pretty_name=name)
    count = sum(reason == kept for reason in reasons)
    lines = [
        f"# {_plain(name or 'Filtered dataset')}",
        "",
        f"{count:,} of {len(reasons):,} rows of {_code(source or 'a dataset')}, selected by `resofilter_trainer` "
        f"{_plain(provenance.versions.get('resofilter_trainer', ''))}: {_measured(provenance)}.",
        "",
        *(_weighing(weight_column) if weight_column else []),
        "| dropped rows | reason |",
        "|---|---|",
        *(f"| {n:,} | {_plain(why)} |" for why, n in count_reasons((r for r in reasons if r != kept), LISTED)),
        "",
        "## How to reproduce it",
        "",
        *_how(commands_of(provenance, policy, reasons, group_column), policy),
        "",
        "## What the scores were made from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_code(value)} |" for name, value in _origin(provenance)),
        "",
        f"Licence: {_plain(licence)}, as the source dataset." if licence else "Licence: see the source dataset.",
        "",
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _weighing(column: str) -> list[str]:
    text = f"The rows do not count alike: multiply each row's loss by its {_code(column)}, in Python"
    return [f"{text} with `SampleWeights(dataset[{column!r}])`. Without, a training on them is biased.", ""]


def push_card(card: DatasetCard, repo_id: str, revision: str | None, token: Any) -> None:
    """Push the card to where `Dataset.push_to_hub` pushed rows, and keep what that wrote into the card's header.

    Args:
        card: the card.
        repo_id, revision, token: as for `Dataset.push_to_hub`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "token": token}
    try:
        pushed = DatasetCard.load(hf_hub_download(repo_id, "README.md", **where)).data.to_dict()
    except EntryNotFoundError:
        pushed = {}
    card.data = DatasetCardData(**{**pushed, **card.data.to_dict()})
    card.push_to_hub(repo_id, **where)


def licence_of(source: Any) -> str | None:
    """The licence that the dataset's own card names, in its folder or on the Hub; None if it cannot be found."""
    import yaml
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(source, str) or not source:
        return None
    try:
        if Path(source).is_dir():
            path = str(Path(source) / "README.md")
        elif _on_hub(source):
            path = hf_hub_download(source, "README.md", repo_type="dataset", etag_timeout=PATIENCE)
        else:
            return None
        return DatasetCard.load(path).data.to_dict().get("license")
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError):  # no network, no card, or a card with a broken header
        return None


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
    score = {"model": provenance.model, **_source(provenance.source), **_measure(provenance), **_rows(provenance)}
    score |= {
        "drop_duplicates": any(reason.startswith(SAME_PROMPT) for reason in unique),
        "drop_empty": EMPTY in unique,
        "output": "scores",
    }
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
    found = [f"resofilter score{_flags(score)}", f"resofilter select scores{_flags(select)}"]
    if "checks" in provenance.source:
        names = dataclasses.fields(ColumnMapping)
        columns = {each.name: score[each.name] for each in names if each.name in score}
        found.insert(0, f"resofilter check{_flags({**_source(provenance.source), **columns, 'output': 'checks'})}")
    return [] if any("\n" in command for command in found) else found


def _how(commands: Sequence[str], policy: Mapping[str, Any]) -> list[str]:
    """The commands as an indented block, which no name can break; without commands, the settings."""
    if commands:
        return [f"    {command}" for command in commands]
    where = "By `ResonanceCallback` in a training run" if "epoch" in policy else "In Python, by a policy"
    return [f"{where}, with these settings:", "", _code(dict(policy))]


def _on_hub(source: Any) -> bool:
    """Whether a dataset's name is one on the Hub, `owner/name`, and no path."""
    if not isinstance(source, str) or Path(source).exists() or FILE_FORMATS.keys() & set(Path(source).suffixes):
        return False
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not source.startswith(".")


def _measure(provenance: Provenance) -> dict[str, Any]:
    """The settings of the measurement that are not the defaults."""
    config = provenance.config
    if "criterion" in config:
        return {"criterion": config["criterion"]}
    return {
        each.name: config[each.name]
        for each in dataclasses.fields(ResonanceConfig)
        if each.name in config and config[each.name] != each.default
    }


def _rows(provenance: Provenance) -> dict[str, Any]:
    """The settings of columns and tokens that are not the defaults."""
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
    flags = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        several = value if isinstance(value, list) else [] if value is True else [value]
        quoted = [shlex.quote(str(each)) for each in several]
        flags += [f"--{name}={quoted[0]}"] if len(quoted) == 1 else [f"--{name}", *quoted]
    return "".join(f" {flag}" for flag in flags)


def _measured(provenance: Provenance) -> str:
    config = provenance.config
    if "criterion" in config and config["criterion"] != RESONANCE:
        return f"scored by {_code(config['criterion'])}"
    return "by how far training on each would move the up-projection weights (ResoFilter, arXiv 2412.14809)"


def _origin(provenance: Provenance) -> list[tuple[str, Any]]:
    """The rows of the card's table of provenance."""
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
    """A value as text on one line, with Markdown escaped."""
    text = " ".join(str(value).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in text)


def _code(value: object) -> str:
    """A value as code, on one line."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"

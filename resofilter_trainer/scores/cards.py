"""What cards on the hub say of scores: what measured them, from what, and the command that repeats it. Knows no model.

Cards are pushed to others: they name no folder of this machine, see `Provenance.without_folders`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import FILE_FORMATS, RESONANCE, ColumnMapping, ResonanceConfig
from ..io.hub import CARD, KIND, check_reachable
from .provenance import Provenance
from .shards import NAMED, SHARD, listed

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

PATIENCE = 3  # seconds to wait for the Hub, which is only asked for a licence
TAG = "resofilter"  # of every card; a card replaces the text of one that has its first tag


def record_card(
    what: str,
    file: str,
    provenance: Provenance,
    lines: Sequence[str],
    licence: str | None = None,
) -> DatasetCard:
    """The card of scores.

    Args:
        what: the name of the class that holds them: `ScoreTable`.
        file: the name of their file.
        provenance: what they were made from.
        lines: what they are, and the command that repeats them, in Markdown.
        licence: the licence of the dataset; by default the one that `licence_of` finds.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    source = provenance.source.get("dataset")
    licence = licence or licence_of(source)
    sources = [str(source)] if is_hub_name(source) else None
    stem = Path(file).stem
    configs = [{"config_name": stem, "data_files": file}] if file.endswith(".parquet") else None
    tags = [f"{TAG}-{stem.replace('_', '-')}", TAG]
    data = DatasetCardData(license=licence, tags=tags, source_datasets=sources, configs=configs)
    provenance = provenance.without_folders()
    text = [
        f"# {stem.replace('_', ' ').capitalize()} of {code(provenance.source.get('dataset') or 'a dataset')}",
        "",
        f"Measured by `resofilter_trainer` {plain(provenance.versions.get('resofilter_trainer', ''))}: "
        f'{measured(provenance)}. In Python, `{what}.from_hub("owner/name")` loads them.',
        "",
        *lines,
        *origin_lines(provenance),
        *licence_lines(licence),
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))


def score_options(provenance: Provenance, drop_duplicates: bool, drop_empty: bool) -> dict[str, Any]:
    """The options of the `resofilter score` that makes these scores again."""
    return {
        "model": provenance.model,
        **source_options(provenance.source),
        **_measure(provenance),
        **_rows(provenance),
        "drop_duplicates": drop_duplicates,
        "drop_empty": drop_empty,
        "output": "scores",
    }


def score_lines(provenance: Provenance, drop_duplicates: bool, drop_empty: bool) -> list[str]:
    """The command that makes these scores again, as a block; without one, how they were made."""
    if "run" in provenance.preparation:
        return ["`ResonanceCallback` measured them in a training run.", ""]
    commands = scoring_commands(score_options(provenance, drop_duplicates, drop_empty), provenance.source)
    if not commands or any("\n" in command for command in commands):
        return []
    return ["## How to reproduce it", "", *as_block("\n".join(commands))]


def scoring_commands(score: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """The commands that score: one, or one for each shard and one that joins their scores; none for unknown rows.

    Args:
        score: the options of `score_options`.
        source: the source of the scores.
    """
    shards = listed(source)
    if not shards or "dataset" in source:  # of shards of one dataset, all at once
        return [f"resofilter score{flags(score)}"]
    if any(each.dataset is None for each in shards):
        return []
    places = list(dict.fromkeys(tuple(getattr(each, name) for name in NAMED) for each in shards))
    folders = [f"scores-{number}" for number in range(len(places))]
    own = [
        {**score, **source_options(dict(zip(NAMED, place, strict=True))), "output": folder}
        for place, folder in zip(places, folders, strict=True)
    ]
    return [
        *(f"resofilter score{flags(each)}" for each in own),
        f"resofilter join {' '.join(folders)}{flags({'output': 'scores'})}",
    ]


def as_block(text: str) -> list[str]:
    """A text as an indented block, which nothing in it can break."""
    return [*(f"    {line}" for line in text.splitlines()), ""]


def origin_lines(provenance: Provenance) -> list[str]:
    """The table of what scores were made from."""
    rows = [f"| {name} | {code(value)} |" for name, value in origin(provenance)]
    return ["## What the scores were made from", "", "| | |", "|---|---|", *rows, ""]


def licence_lines(licence: str | None) -> list[str]:
    """The line of the licence."""
    return [f"Licence: {plain(licence)}, as the source dataset." if licence else "Licence: see the source dataset.", ""]


def licence_of(source: Any) -> str | None:
    """The licence that the dataset's own card names, in its folder or on the Hub; None if it cannot be found."""
    import yaml
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(source, str) or not source:
        return None
    try:
        if Path(source).is_dir():
            path = str(Path(source) / CARD)
        elif is_hub_name(source):
            check_reachable("dataset", source, [CARD], KIND)
            path = hf_hub_download(source, CARD, repo_type=KIND, etag_timeout=PATIENCE)
        else:
            return None
        return DatasetCard.load(path).data.to_dict().get("license")
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError):  # no network, no card, or a card with a broken header
        return None


def is_hub_name(source: Any) -> bool:
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


def source_options(source: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name the dataset."""
    split = source.get("split")
    return {
        "dataset": source.get("dataset"),
        "split": None if split == "train" else split,
        "dataset_config": source.get("name"),
        "shard": f"{source[SHARD]['index']}/{source[SHARD]['count']}" if SHARD in source else None,
    }


def flags(values: Mapping[str, Any]) -> str:
    """Options as they are written in a shell, without those that are not set."""
    found = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        several = value if isinstance(value, list) else [] if value is True else [value]
        quoted = [shlex.quote(str(each)) for each in several]
        found += [f"--{name}={quoted[0]}"] if len(quoted) == 1 else [f"--{name}", *quoted]
    return "".join(f" {flag}" for flag in found)


def measured(provenance: Provenance) -> str:
    """By what rows were scored, in words."""
    config = provenance.config
    if "criterion" in config and config["criterion"] != RESONANCE:
        return f"scored by {code(config['criterion'])}"
    return "by how far training on each would move the up-projection weights (ResoFilter, arXiv 2412.14809)"


def origin(provenance: Provenance) -> list[tuple[str, Any]]:
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


def plain(value: object) -> str:
    """A value as text on one line, with Markdown escaped."""
    text = " ".join(str(value).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in text)


def code(value: object) -> str:
    """A value as code, on one line."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"

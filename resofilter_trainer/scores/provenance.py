"""What scores were made from, and how far they can be trusted. Knows names and hashes, no model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import FILE_FORMATS
from ..io.made_from import differences, refuse_differences

ENOUGH = 0.95  # rank agreement
SATURATED = (
    "the ranking rests on the few entries whose gradient is near eps. Use a larger eps, such as eps=1e-4, or "
    'update="sgd" with norm="l2"'
)
NAMED = ("dataset", "reference", "chat_template_path")  # names in a source that may be paths, relative ones too
LOCAL = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")  # begins what is certainly a path
OF_SOURCE = ("chat_template_path", "trust_remote_code")  # arguments of SFTConfig, where they were passed


@dataclass(frozen=True)
class Trust:
    """How far the scores of a table can be trusted.

    Attributes:
        agreement: Spearman's rank correlation between the scores of a random subset of rows and the same rows measured
            again: alone, without autocast and, if `in_float32`, with float32 weights; and in other batches; the lower
            of the two. Noise lowers it from 1. It does not show what was lost when weights were rounded to bfloat16.
            None for fewer than three rows.
        rows: the size of the subset.
        saturation: the distance between the smallest and the largest score, as a share of the possible range (0 to lr).
            None for an update without bounds.
        forward: the precision of the forward: `"float32"` (or the weights' dtype), or `"bfloat16"` by autocast.
        saturated: whether most scores are nearly the largest possible one, see `full_step.is_saturated`. False in files
            of 0.1.0, where it is not known.
        in_float32: whether bfloat16 weights were converted to float32 for measuring alone. False where memory or the
            model did not allow it, and in files of 0.1.0.
    """

    agreement: float | None
    rows: int
    saturation: float | None
    forward: str = "float32"
    saturated: bool = False
    in_float32: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the agreement is unknown or at least 0.95."""
        return self.agreement is None or self.agreement >= ENOUGH

    @property
    def trusted(self) -> bool:
        """Whether the ranks agree and the scores are not saturated."""
        return self.agrees and not self.saturated

    @property
    def measured(self) -> str:
        """What was measured again, and how it agrees."""
        agreement = "unknown (too few rows)" if self.agreement is None else f"{self.agreement:.4f}"
        alone = "alone, in float32," if self.in_float32 else "alone"
        saturation = "" if self.saturation is None else f", {self.saturation:.3%} of the possible range in use"
        text = f"rank agreement {agreement} over {self.rows} rows scored again {alone} and in other batches{saturation}"
        return text if self.forward == "float32" else f"{text}; {self.forward} forward"

    @property
    def noise(self) -> str:
        """What an agreement that is too low means, and what helps."""
        remedy = "use a larger eps (1e-4), update='sgd' with norm='l2', or float32"
        return f"below {ENOUGH} the ranking is partly noise: {remedy}"

    def __str__(self) -> str:
        text = self.measured if self.agrees else f"{self.measured}; {self.noise}"
        return f"{text}; saturated: {SATURATED}" if self.saturated else text


@dataclass(frozen=True)
class Provenance:
    """What a table of scores was made from. Tables are joined or reused only if everything but the names is equal.

    Attributes:
        model: the model's name as the user passed it. Not compared.
        weights, tokenizer, template: hashes of the weights, the tokenizer, and its chat template.
        dataset: a hash of the scored token ids and labels.
        rows: the number of rows in the user's dataset.
        config: the ResonanceConfig, or the settings of another criterion.
        preparation: how rows were turned into tokens: column mapping, lengths, masking, precision.
        versions: the versions of this package and of the packages that compute.
        source: the dataset's name as the user passed it, a hash of its rows, and the arguments in `OF_SOURCE`. Not
            compared.
        trust: see `Trust`. Not compared, except for its `forward`.
        warmup: what a warm-up has cost (`rows`, `tokens`, `steps`, `seconds`, `processes`), and a hash of the tuned
            `weights`; empty without one. Not compared: `weights` are those of the model before it, and what it depends
            on is in `config`.
    """

    model: str
    weights: str
    tokenizer: str
    template: str
    dataset: str
    rows: int
    config: Mapping[str, Any]
    preparation: Mapping[str, Any]
    versions: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)
    trust: Trust | None = None
    warmup: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("config", "preparation", "versions", "source", "warmup"):  # as read from JSON: lists for tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def without_folders(self) -> Provenance:
        """The same for others: of a path on this machine, the last part, as `./rows.jsonl`. What is compared stays."""
        return dataclasses.replace(self, model=_without_folders(self.model, True), source=_shared(self.source))

    @property
    def key(self) -> str:
        """Everything that is compared except `trust.forward`, as JSON text."""
        ignored = ("model", "source", "trust", "warmup")
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if name not in ignored})

    @property
    def compared(self) -> dict[str, Any]:
        """Everything that is compared except `trust.forward`, in one mapping."""
        return {**self._hashes, **self.config, **self.preparation, **self.versions}

    @property
    def _hashes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "tokenizer", "template", "dataset", "rows")}

    def differences(self, other: Provenance) -> list[str]:
        """The differences in words, as `name (self / other)`; empty if scores of both belong together."""
        found = []
        if self.weights != other.weights:
            found.append(f"model weights ({self.model} {self.weights[:8]} / {other.model} {other.weights[:8]})")
        found += differences(self._hashes, other._hashes, ("tokenizer", "template", "dataset", "rows"))
        for name in ("config", "preparation", "versions"):
            found += differences(getattr(self, name), getattr(other, name))
        forwards = [each.trust.forward for each in (self, other) if each.trust is not None]
        if len(set(forwards)) > 1:  # precision="auto" chooses for each machine
            found.append(f"forward ({' / '.join(forwards)})")
        return found

    def check_same(self, here: Provenance, what: str, place: object) -> None:
        """Raise InputError if saved scores, whose provenance this is, were made from something else.

        Args:
            here: the provenance that they should have.
            what: the kind of scores, for the message: `token scores`.
            place: their folder or file.
        """
        remedy = "Choose another folder, or remove that one."
        refuse_differences(self.differences(here), f"'{place}' holds {what}", remedy)

    def to_json(self) -> str:
        """The text for a file's metadata."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read what `to_json` wrote. Raises ValueError, TypeError or KeyError for text of another version."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("not a mapping")
        trust = values.pop("trust")
        made = cls(**values, trust=None if trust is None else Trust(**trust))
        for each in dataclasses.fields(cls):
            kind = {"str": str, "int": int}.get(str(each.type), Mapping if "Mapping" in str(each.type) else object)
            if not isinstance(getattr(made, each.name), kind):
                raise TypeError(f"{each.name} has another type")
        return made


def _shared(source: Any, name: str = "") -> Any:
    """A source for others: without folders, at any depth, as joined scores list the sources of their shards."""
    if isinstance(source, Mapping):
        return {key: _shared(value, key) for key, value in source.items()}
    if isinstance(source, list):
        return [_shared(each, name) for each in source]
    return _without_folders(source, name in NAMED) if isinstance(source, str) else source


def _without_folders(text: str, is_name: bool) -> str:
    """A text as it is; of a path, `./` and its last part, which no hub takes for a name.

    Args:
        text: the text.
        is_name: whether it names something that is a path where it exists here, or where it ends as files of data do.
    """
    local = LOCAL.match(text) is not None
    if is_name and text and not local:
        local = Path(text).exists() or bool(FILE_FORMATS.keys() & {*Path(text).suffixes})
    return "./" + re.split(r"[/\\]", text.rstrip("/\\"))[-1] if local else text

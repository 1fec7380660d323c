"""What a table of scores was measured from, and how far it can be trusted. Knows names and hashes, no model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..io.made_from import differences, refuse_differences


@dataclass(frozen=True)
class Trust:
    """How far the scores of one table can be trusted.

    Attributes:
        agreement: rank correlation (Spearman) of a random subset's scores with the same rows' scores measured alone,
            without autocast, and in other batches; the lower of the two. 1 is perfect, numerical noise lowers it. What
            bfloat16 weights lost when they were made, it cannot see. None where there are fewer than three rows.
        rows: size of that subset.
        saturation: share of the possible range (0 to lr) that lies between the smallest and the largest score; None
            where the update has no bound. Small means that the ranking rests on small differences.
        forward: what the forward ran in, `"float32"` (or the weights' own dtype) or `"bfloat16"`, by autocast.
    """

    agreement: float | None
    rows: int
    saturation: float | None
    forward: str = "float32"

    @property
    def trusted(self) -> bool:
        """Whether the agreement is at least 0.95, or unknown."""
        return self.agreement is None or self.agreement >= 0.95

    def __str__(self) -> str:
        agreement = "unknown (too few rows)" if self.agreement is None else f"{self.agreement:.4f}"
        saturation = "" if self.saturation is None else f", {self.saturation:.3%} of the possible range in use"
        text = f"rank agreement {agreement} over {self.rows} rows scored again alone and in other batches{saturation}"
        if self.forward != "float32":
            text += f"; {self.forward} forward"
        if self.trusted:
            return text
        return f"{text}; below 0.95 the ranking is partly noise: use a larger eps (1e-4), norm='l2', or float32"


@dataclass(frozen=True)
class Provenance:
    """What a table of scores was measured from. Tables are mixed or reused only where all but names agree.

    Attributes:
        model, source: the names of the model and of the dataset, as the user gave them, and a hash of its rows. Not
            compared.
        weights, tokenizer, template, dataset: hashes of the weights, the tokenizer, its chat template, and the token
            ids and labels that were scored.
        rows: number of rows in the user's dataset.
        config: the ResonanceConfig.
        preparation: how rows became tokens: column mapping, lengths, masking, precision.
        versions: of this package and of those that compute.
        trust: see `Trust`; not compared.
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

    def __post_init__(self) -> None:
        for name in ("config", "preparation", "versions", "source"):  # as JSON has them: lists, no tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @property
    def key(self) -> str:
        """All that is compared, as JSON: equal where scores of both belong together."""
        aside = ("model", "source", "trust")
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if name not in aside})

    @property
    def compared(self) -> dict[str, Any]:
        """All that is compared, flat, by name."""
        return {**self._hashes, **self.config, **self.preparation, **self.versions}

    @property
    def _hashes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "tokenizer", "template", "dataset", "rows")}

    def differences(self, other: Provenance) -> list[str]:
        """What keeps the two apart, in words; empty where scores of both belong together."""
        found = []
        if self.weights != other.weights:
            found.append(f"model weights ({self.model} {self.weights[:8]} / {other.model} {other.weights[:8]})")
        found += differences(self._hashes, other._hashes, ("tokenizer", "template", "dataset", "rows"))
        for name in ("config", "preparation", "versions"):
            found += differences(getattr(self, name), getattr(other, name))
        forwards = [each.trust.forward for each in (self, other) if each.trust is not None]
        if len(set(forwards)) > 1:  # precision="auto" may choose another on another machine
            found.append(f"forward ({' / '.join(forwards)})")
        return found

    def check_same(self, here: Provenance, what: str, place: object) -> None:
        """Raise InputError where scores at a place, whose provenance this is, were made from something else.

        Args:
            here: the provenance they should have.
            what: the kind of scores, for people.
            place: the folder or file that holds them.
        """
        remedy = "Choose another folder, or remove that one."
        refuse_differences(self.differences(here), f"'{place}' holds {what}", remedy)

    def to_json(self) -> str:
        """As it is stored in the Parquet file's metadata."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Undo `to_json`. Raises ValueError, TypeError or KeyError where it is of another version."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("no mapping")
        trust = values.pop("trust")
        made = cls(**values, trust=None if trust is None else Trust(**trust))
        for each in dataclasses.fields(cls):
            kind = {"str": str, "int": int}.get(str(each.type), Mapping if "Mapping" in str(each.type) else object)
            if not isinstance(getattr(made, each.name), kind):
                raise TypeError(f"{each.name} is of another kind")
        return made

"""The settings of the method `dynamics`: the criterion that it ranks rows by, and what that needs. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import InputError, one_of
from ..ledger.dynamics import RANKED
from ..selecting.data_selector import DataSelector


@dataclass(frozen=True)
class DynamicsSettings:
    """What to rank rows by.

    Attributes:
        by: the name of a criterion of learning dynamics, one of `ledger.dynamics.RANKED`.
        drop: the end to drop, `"largest"` or `"smallest"`; by default the criterion's own.
        length_out: whether to rank by what the criterion says beyond the length, as in `DataSelector`.

    Raises:
        InputError: a setting is unknown or cannot be used with another one.
    """

    by: str = ""
    drop: str | None = None
    length_out: bool = False

    def __post_init__(self) -> None:
        if not self.by:
            raise InputError("The method 'dynamics' needs a setting 'by', such as {by: loss_slope}.")
        one_of("by", self.by, tuple(RANKED))
        if self.drop is not None:
            one_of("drop", self.drop, ("largest", "smallest"))
        self.policy(keep=0.5)

    def policy(self, keep: float) -> DataSelector:
        """The policy that keeps a share of the rows."""
        return DataSelector(keep=keep, by=self.by, drop=self.drop, length_out=self.length_out)  # type: ignore[arg-type]

    @property
    def epochs(self) -> int:
        """The number of epochs that the training must have, for each row to be met as often as the criterion needs."""
        return RANKED[self.by].least

"""What the installed versions of other libraries lack: tests of it are skipped, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from resofilter_trainer.config import VersionError
from resofilter_trainer.config.compatibility import SINCE, has, installed, training_arguments


def arguments_here(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SFTConfig's arguments under the names of the installed version; the test is skipped where it has no such.

    The loss shows the loss of each token, by default in newer versions only.
    """
    try:
        return training_arguments({**({} if has("one nll") else {"loss_type": "nll"}), **settings})
    except VersionError as error:
        pytest.skip(str(error))


def skip_without(feature: str) -> None:
    """Skip the test where the installed version lacks something of `SINCE`."""
    if not has(feature):
        package, version = SINCE[feature]
        pytest.skip(f"{feature} came with {package} {version}, and {installed(package)} is installed")

"""What the installed versions of other libraries lack: tests of it are skipped, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from packaging.version import Version

from resofilter_trainer.config.compatibility import SINCE, has, installed, training_arguments


def arguments_here(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SFTConfig's arguments under the names of the installed version."""
    if "selective" in (settings.get("activation_checkpointing_kwargs") or ()):
        skip_without("activation_checkpointing")
    if older_than("transformers", "5.0"):  # by default a folder's name is the time, and stands in each checkpoint
        settings = {"logging_dir": "runs", **settings}
    return training_arguments(settings)


def older_than(package: str, version: str) -> bool:
    """Whether the installed version of a package is older."""
    found = installed(package)
    return found is not None and found < Version(version)


def skip_without(feature: str) -> None:
    """Skip the test where the installed version lacks something of `SINCE`."""
    if not has(feature):
        package, version = SINCE[feature]
        pytest.skip(f"{feature} came with {package} {version}, and {installed(package)} is installed")


def all_there() -> bool:
    """Whether the installed versions lack nothing of `SINCE`."""
    return all(map(has, SINCE))


takes_its_own_batch_size = pytest.mark.skipif(
    older_than("transformers", "5.0"), reason="transformers before 5 resumes with the checkpoint's batch size"
)

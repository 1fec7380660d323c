"""The package's own files, for tests that read the source."""

from __future__ import annotations

from pathlib import Path

import resofilter_trainer

HOME = Path(resofilter_trainer.__file__).parent


def modules() -> dict[str, Path]:
    """Every module by its dotted name within the package, `selecting.policies`; of a package the package's name."""
    found = {}
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]
    return found

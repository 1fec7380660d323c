"""What the package adds to an environment that has TRL: megabytes of every extra, and seconds to import.

    python benchmarks/installed.py

Sizes are those of the files that each distribution lists, without bytecode, with all that it needs. Times are medians
of fresh processes.
"""

from __future__ import annotations

import importlib.metadata
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement

ROUNDS = 7
OWN = "resofilter_trainer"
IMPORTS = {
    "python": "pass",
    "TRL: from trl import SFTTrainer": "from trl import SFTTrainer",
    "and the callback": "from trl import SFTTrainer; from resofilter_trainer import ResonanceCallback",
    "import resofilter_trainer": "import resofilter_trainer",
    "resofilter --help": "import sys; sys.argv[1:] = ['--help']; from resofilter_trainer.cli import main; main()",
    "resofilter score --help": "import sys; sys.argv[1:] = ['score', '--help']; "
    "from resofilter_trainer.cli import main; main()",
}


def needed(names: list[str]) -> set[str]:
    """The distributions that are installed for some requirements, their own requirements included."""
    found, left = set(), [Requirement(name) for name in names]
    while left:
        wanted = left.pop()
        key = (re.sub(r"[-_.]+", "-", wanted.name.lower()), frozenset(wanted.extras))
        if key in found:
            continue
        try:
            requires = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(key)
        for each in map(Requirement, requires):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                left.append(each)
    return {name for name, _ in found}


def megabytes(name: str) -> float:
    if name == OWN.replace("_", "-"):  # installed in place, it lists no files
        return size_of(list((Path(__file__).parents[1] / OWN).rglob("*")))
    return size_of([Path(str(each.locate())) for each in importlib.metadata.files(name) or []])


def size_of(files: list[Path]) -> float:
    return sum(each.stat().st_size for each in files if each.is_file() and each.suffix != ".pyc") / 1e6


def seconds(code: str) -> float:
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def main() -> None:
    before = needed(["trl"])
    print(f"| installed beyond TRL ({sum(map(megabytes, before)):.0f} MB) | distributions | MB |\n|---|---|---|")
    for extra in ("", "[report]", "[compare]", "[eval]", "[all]"):
        added = needed([OWN + extra]) - before
        print(f"| `resofilter_trainer{extra}` | {len(added)} | {sum(map(megabytes, added)):.1f} |")
    print("\n| fresh process | seconds |\n|---|---|")
    for what, code in IMPORTS.items():
        print(f"| {what} | {seconds(code):.2f} |")


if __name__ == "__main__":
    main()

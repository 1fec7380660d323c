"""`resofilter env`: the versions, for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from .parser import CommandParser

PACKAGES = ("resofilter_trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "evaluate")

EXAMPLES = ("resofilter env", "resofilter env > versions.txt")


def add_arguments(parser: CommandParser) -> None:
    """Add nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print what a bug report needs."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")

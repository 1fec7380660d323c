"""A job that is killed at any moment resumes and writes the same bytes. `tests/kills.py --runs 60` kills more often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import JOBS

RUNS = len(JOBS)  # one of each; `python kills.py` kills as many as you like


@pytest.mark.slow
def test_jobs_killed_at_random_moments_write_the_same_bytes():
    command = [sys.executable, "kills.py", "--runs", str(RUNS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("same bytes") == len(JOBS)

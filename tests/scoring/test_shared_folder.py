"""Several processes see the folder that the main one writes to, or all of them stop before anything is measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from resofilter_trainer import InputError
from resofilter_trainer.scoring import passes


@pytest.mark.parametrize("seen", [True, False])
def test_a_folder_that_one_process_does_not_see_is_refused_in_all(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "PartialState", lambda: SimpleNamespace(num_processes=3, is_main_process=True))
    monkeypatch.setattr(passes, "from_main", lambda work: work())
    monkeypatch.setattr(passes, "gather_object", lambda own: [*own, seen, True])
    (tmp_path / ".seen-by a killed run").touch()
    if seen:
        with passes.locked(tmp_path):
            assert not list(tmp_path.glob(".seen-*"))
    else:
        said = f"Process 1 of 3 does not see what process 0 writes to '{tmp_path}'."
        with pytest.raises(InputError, match=said), passes.locked(tmp_path):
            raise AssertionError("must not be entered")
    assert not list(tmp_path.glob(".seen-*"))


def test_a_file_that_appears_late_is_seen_and_one_that_does_not_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "APPEARS", 0.05)
    assert not passes._appears(tmp_path / "note")
    monkeypatch.setattr(passes.time, "sleep", lambda pause: (tmp_path / "note").touch())
    assert passes._appears(tmp_path / "note")

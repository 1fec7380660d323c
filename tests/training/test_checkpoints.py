"""What a checkpoint lacks, by its files."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from resofilter_trainer.training.checkpoints import last_complete, warn_of_missing_state

OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("stage", "files", "whole"),
    [
        (0, ["mp_rank_00_model_states.pt"], True),  # which has the optimizer's state as well
        (0, [], False),
        (2, ["mp_rank_00_model_states.pt", OPTIMIZER], True),
        (2, ["mp_rank_00_model_states.pt"], False),
    ],
)
def test_where_deepspeed_keeps_the_optimizer(stage, files, whole, tmp_path):
    engine = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True, accelerator=engine, lr_scheduler=None, args=SimpleNamespace(process_index=0)
    )
    (tmp_path / "global_step4").mkdir()
    for name in ("scheduler.pt", "rng_state_0.pth", *(f"global_step4/{each}" for each in files)):
        (tmp_path / name).touch()
    if whole:
        with warnings.catch_warnings(action="error"):
            warn_of_missing_state(trainer, tmp_path)
    else:
        with pytest.warns(UserWarning, match="optimizer"):
            warn_of_missing_state(trainer, tmp_path)


def test_the_last_checkpoint_is_one_that_was_written_to_its_end(tmp_path):
    assert last_complete(tmp_path) is None
    for step, state in ((2, "{}"), (8, '{"step": 8}'), (10, '{"step": 10}'), (12, '{"st'), (14, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-16").mkdir()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-10")

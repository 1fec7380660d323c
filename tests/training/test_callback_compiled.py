"""Training with torch.compile is measured: the hooks run between the graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import Outcome, arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, SampleWeights

COUNT = 8
SETTINGS = {"eps": 1e-4, "correct_drift": False}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A function that trains a model of two layers."""

    def run(callback=None, **changes) -> Outcome:
        torch.compiler.reset()
        trainer = SFTTrainer(
            llama(len(tokenizer), num_hidden_layers=2),
            arguments(tmp_path, **{"per_device_train_batch_size": 4, "num_train_epochs": 1, **changes}),
            train_dataset=rows(COUNT),
            processing_class=tokenizer,
            callbacks=[] if callback is None else [callback],
        )
        trainer.train()
        return Outcome(trainer, callback, [])

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # nor this one
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_scores_and_weights_of_a_compiled_model(backend, run):
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    plain = run(ResonanceCallback(keep=1.0, n_layers=1, **SETTINGS))
    mine, without = run(ResonanceCallback(keep=1.0, n_layers=1, **SETTINGS), **compiled), run(None, **compiled)
    for name, weight in mine.weights.items():
        assert torch.equal(weight, without.weights[name]), name
    expected = plain.callback.scores.column("score")
    np.testing.assert_allclose(mine.callback.scores.column("score"), expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_weights_for_rows_are_refused(run):
    with pytest.raises(InputError, match=r"cannot be weighted with torch_compile=True, which .* torch_compile=False"):
        run(SampleWeights(np.ones(COUNT)), torch_compile=True)

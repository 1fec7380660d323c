"""The score: how far one optimizer step on one sample moves W_up. Knows nothing of datasets, files or trainers.

    resonance(sample) = mean over the last n layers of mean |W_up - W_up'|    (ResoFilter, arXiv 2412.14809)

W_up is the effective matrix: the one that the layer's forward multiplies its input by, adapters included. Whatever is
trained in truth, W_up' is what the step on this sample alone would make of it if it were a plain trainable weight:

    an adapter       counts as a part of W_up: a model scores the same before and after its adapter is merged
    weight decay     is that of W_up itself, so for LoRA of W + scaling * B A
    a shared weight  is a matrix of its own in each layer that uses it, moved by the gradient through that layer alone
    several maps     in one layer, such as experts, are one weight: the mean is over the entries of all
    an expert        that no token reaches has a gradient of zero, whether the experts are modules or one tensor

`literal` computes this formula directly: one sample, a fresh optimizer, one step, the difference, the weights restored.
It is slow, and the tests compare everything with it; `recorder.py` computes the same numbers for whole batches.
docs/adapters.md lists what counts for each kind of adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError, ResonanceConfig, with_known_keywords
from .effective import check_maps, merged_stacks, standing_in, undo_merge_if_off, unshared
from .losses import IGNORE
from .modes import at_least_float32, evaluating, own_precision, requiring_grad
from .quantised import check_plain
from .unreached import used_once
from .up_projection import UpProjection
from .updates import fresh_optimizer


@dataclass(frozen=True)
class Resonance:
    """The measurements of B samples.

    Attributes:
        loss: (B,) float64, each sample's own mean token loss, in nats.
        num_tokens: (B,) int64, the number of learnt tokens.
        layers: (B, n_layers) float64, the change of each layer's up-projection in the unit of the weights, lowest layer
            first.
        signals: (B,) float64 by name, the signals that the recorder was asked for (see `signals.py`).
    """

    loss: np.ndarray
    num_tokens: np.ndarray
    layers: np.ndarray
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def score(self) -> np.ndarray:
        """(B,) float64, the mean over the layers."""
        return self.layers.mean(axis=1)

    def take(self, samples: np.ndarray) -> Resonance:
        """The measurements of some samples, in this order."""
        signals = {name: values[samples] for name, values in self.signals.items()}
        return Resonance(self.loss[samples], self.num_tokens[samples], self.layers[samples], signals)

    @classmethod
    def joined(cls, measured: Sequence[Resonance]) -> Resonance:
        """The measurements of all samples, one after another."""
        return cls(
            loss=np.concatenate([each.loss for each in measured]),
            num_tokens=np.concatenate([each.num_tokens for each in measured]),
            layers=np.concatenate([each.layers for each in measured]),
            signals={name: np.concatenate([each.signals[name] for each in measured]) for name in measured[0].signals},
        )


@with_known_keywords
def literal(model: nn.Module, samples: Sequence[Mapping[str, Tensor]], config: ResonanceConfig) -> Resonance:
    """Measure samples literally, as ResoFilter's released code does.

    Args:
        model: a causal language model in float32 or float64. All its parameters are trained and restored.
        samples: mappings with `input_ids` (T,) and `labels` (T,), -100 for tokens that are not learnt.
        config: the step to take, and how to measure its change.

    Returns:
        The measurements of the B samples, in their order.

    Raises:
        InputError: the weights are quantised, bfloat16 or float16; the model has no known up-projection; or the update
            is `"optimizer"`.
    """
    check_plain(model, "The literal procedure")
    losses, layers = [], []
    with _plainly_trainable(model, config) as (up_projections, weights):
        start = {name: value.detach().clone() for name, value in model.state_dict().items()}
        before = [weight.detach().clone() for weight in weights]
        try:
            for sample in samples:
                model.load_state_dict(start)
                _restore(weights, before)
                losses.append(_one_step(model, up_projections, weights, sample, config))
                changes = [old - new.detach() for old, new in zip(before, weights, strict=True)]
                ups = [each.up(change) for each, change in zip(up_projections, changes, strict=True)]
                layers.append(layer_values(up_projections, ups, config))
        finally:
            model.load_state_dict(start)
    tokens = [int((sample["labels"][1:] != IGNORE).sum()) for sample in samples]
    return Resonance(np.array(losses), np.array(tokens), np.array(layers))


@contextlib.contextmanager
def _plainly_trainable(
    model: nn.Module, config: ResonanceConfig
) -> Iterator[tuple[tuple[UpProjection, ...], list[nn.Parameter]]]:
    """The model with every effective matrix as a trainable parameter of its own, among its parameters or beside them.

    Yields the up-projections and these parameters, each of the stored shape. A model without adapters and shared
    weights trains its own.
    """
    with unshared(model, config.n_layers, config.up_projection) as found:
        _refuse_half_precision(found)
        check_maps(found)
        undo_merge_if_off(model)
        with (
            evaluating(model),
            requiring_grad(model.parameters(), True),
            merged_stacks(found),
            own_precision(model),
            standing_in(found) as weights,
            used_once(model, found),
        ):
            yield found, weights


@torch.no_grad()
def _restore(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _one_step(
    model: nn.Module,
    up_projections: Sequence[UpProjection],
    weights: Sequence[nn.Parameter],
    sample: Mapping[str, Tensor],
    config: ResonanceConfig,
) -> float:
    """One step of a fresh optimizer on one sample, as a batch of one; returns the loss before the step."""
    parameters = list(dict.fromkeys([*model.parameters(), *weights]))
    optimizer = fresh_optimizer(parameters, config)
    optimizer.zero_grad()
    ids, labels = sample["input_ids"][None], sample["labels"]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    loss = F.cross_entropy(at_least_float32(logits[:-1]), labels[1:], ignore_index=IGNORE)
    loss.backward()
    _give_unreached_experts_zeros(up_projections, weights)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _give_unreached_experts_zeros(up_projections: Sequence[UpProjection], weights: Sequence[nn.Parameter]) -> None:
    """A gradient of zero for experts without one, in blocks that the loss depends on: an optimizer skips None."""
    for each, weight in zip(up_projections, weights, strict=True):
        used = each.kind == "experts" and any(own.grad is not None for own in each.module.parameters())
        if used and weight.grad is None:
            weight.grad = torch.zeros_like(weight)


def layer_values(
    up_projections: Sequence[UpProjection], changes: Sequence[Tensor], config: ResonanceConfig
) -> list[float]:
    """Mean |change|, or its L2 norm, over all up-projections of each layer, lowest layer first."""
    by_layer: dict[int, list[Tensor]] = {}
    for each, change in zip(up_projections, changes, strict=True):
        by_layer.setdefault(each.layer, []).append(change.double().flatten())
    values = [torch.cat(flat) for flat in by_layer.values()]
    return [(value.abs().mean() if config.norm == "mean_abs" else value.norm()).item() for value in values]


def _refuse_half_precision(up_projections: Sequence[UpProjection]) -> None:
    for each in up_projections:
        if each.parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"The literal procedure needs float32 or float64 weights, and '{each.name}' is {each.parameter.dtype}: "
                "a change of 1e-5 is smaller than the gap between two such numbers near 0.02, so rounding loses or "
                "doubles it. Load the model in float32, or use the recorder, which never computes the changed weight."
            )

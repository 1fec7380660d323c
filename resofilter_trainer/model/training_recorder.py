"""The score of samples that someone else trains on, from the backward that happens anyway.

Knows models and batches, not who trains, nor on what. It watches: no gradient is written, no random number drawn, no
weight touched, so training with it is bit for bit training without it.

    expect -> [forward: a, loss | backward: b -> each sample: scale * b^T a -> update -> sum] x micro-batches -> take

The loss of an update is a sum over the tokens of all its samples, times a weight. So a sample's own mean-loss gradient
is its part of the gradient divided by that weight and by its number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError, ResonanceConfig
from .gradients import Segment
from .losses import IGNORE
from .modes import at_least_float32
from .recorder import Call, call_sums, used_twice
from .resonance import Resonance, layer_values
from .up_projection import UpProjection, find_up_projections
from .updates import UPDATES, closed_form, size_of_change, unchanged_sum

NOTHING_RECORDED = (
    "A training step went by without a measurement: the forward pass did not call every up-projection, or no gradient "
    "came back to any. A compiled model drops the hooks: train without torch.compile."
)
CLOSED_FORM = "Use update='adamw', which needs no merged weight."


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward that is about to happen, and what was seen of it.

    Attributes:
        input_ids: (B, T), what the model will be given.
        labels: (B, T), -100 where nothing is learnt.
        segments: the N samples in it.
        token_weight: what the loss multiplies every token's own loss by.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Sequence[Segment]
    token_weight: float | Tensor
    sums: dict[nn.Module, Tensor] = field(default_factory=dict)
    losses: Tensor | None = None

    @cached_property
    def num_tokens(self) -> Tensor:
        """(N,) learnt tokens of each sample."""
        learnt = self.labels != IGNORE
        learnt[:, 0] = False
        return torch.stack([learnt[each.row, each.tokens].sum() for each in self.segments])

    @cached_property
    def scales(self) -> Tensor:
        """(N,) from a sample's part of the loss to its own mean loss."""
        return 1 / (self.token_weight * self.num_tokens.clamp(min=1))


class TrainingRecorder:
    """Measures what `Recorder` measures, at the weights and in the mode of the training that it watches.

    Args:
        model: what is trained, wrapped by PEFT or not, but neither compiled nor wrapped for processes.
        config: which step is measured and how; None to see nothing but the losses.

    Raises:
        InputError: the model has no up-projection that is known, or uses one twice in a forward pass.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig | None) -> None:
        self.model, self.config = model, config
        self._modules: dict[nn.Module, list[UpProjection]] = {}
        if config is not None:
            closed_form(config)  # refuses an update that has none
            up_projections = find_up_projections(model, config.n_layers, config.up_projection)
            self._layers = sorted({each.layer for each in up_projections})
            for each in up_projections:
                self._modules.setdefault(each.module, []).append(each)
        self._expected: list[MicroBatch] = []
        self._running: MicroBatch | None = None
        self._begun: list[MicroBatch] = []
        self._called: dict[MicroBatch, set[nn.Module]] = {}
        self._replaying = False
        self._stack = contextlib.ExitStack()

    def attach(self) -> None:
        """Begin to watch."""
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
            *(module.register_forward_hook(self._catch, with_kwargs=True) for module in self._modules),
        ]
        for hook in hooks:
            self._stack.callback(hook.remove)

    def detach(self) -> None:
        """Leave the model as it was found."""
        self._stack.close()
        self.expect([])

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Say which micro-batches come next. A forward on anything else is left alone."""
        self._expected, self._begun, self._running, self._called = list(batches), [], None, {}

    def take(self) -> list[Resonance]:
        """What was measured of each expected micro-batch, in their order; none is expected any longer.

        Raises:
            RuntimeError: a micro-batch with tokens to learn went by unmeasured.
        """
        batches, called = self._expected, self._called
        self.expect([])
        if self.config is not None:
            for each in batches:
                if called.get(each) != set(self._modules) or (not each.sums and each.num_tokens.any()):
                    raise RuntimeError(NOTHING_RECORDED)
        return [self._result(each) for each in batches]

    def _result(self, batch: MicroBatch) -> Resonance:
        count = len(batch.segments)
        losses = np.full(count, np.nan) if batch.losses is None else batch.losses.cpu().double().numpy()
        layers = np.full((count, 0), np.nan) if self.config is None else self._layer_values(batch, self.config)
        return Resonance(loss=losses, num_tokens=batch.num_tokens.cpu().numpy(), layers=layers)

    def _layer_values(self, batch: MicroBatch, config: ResonanceConfig) -> np.ndarray:
        sums = np.zeros((len(batch.segments), len(self._layers)))
        entries = np.zeros(len(self._layers), dtype=np.int64)
        for module, up_projections in self._modules.items():
            column = self._layers.index(up_projections[0].layer)
            entries[column] += sum(each.entries for each in up_projections)
            if module in batch.sums:
                sums[:, column] += batch.sums[module].cpu().numpy()
            else:  # the loss does not depend on it: no gradient, no step
                sums[:, column] += sum(unchanged_sum(each.entries, config) for each in up_projections)
        return size_of_change(sums, entries, config)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids")
        coming = (each for each in self._expected if each not in self._begun and _same(each.input_ids, ids))
        self._running = next(coming, None)
        if self._running is not None:
            self._begun.append(self._running)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._running is not None and self._running.losses is None:
            self._running.losses = _mean_losses(output, self._running)

    def _catch(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook. Checkpointing calls it twice, but lets a gradient through once."""
        if self._running is None or self._replaying or not torch.is_grad_enabled():
            return
        output = output[0] if isinstance(output, tuple) else output
        if not output.requires_grad:  # all below is frozen: the graph begins here
            output.requires_grad_()
        self._called.setdefault(self._running, set()).add(module)
        autocast = torch.is_autocast_enabled(output.device.type), torch.get_autocast_dtype(output.device.type)
        call = Call(self._modules[module], args, kwargs, output.detach())  # with its graph, neither would ever be freed
        output.register_hook(partial(self._measure, self._running, call, autocast))

    def _measure(self, batch: MicroBatch, call: Call, autocast: tuple[bool, torch.dtype], b: Tensor) -> None:
        """Gradient hook, in the backward."""
        module, config = call.up_projections[0].module, self.config
        assert config is not None
        if module in batch.sums:
            raise used_twice(call.up_projections[0])
        device, (enabled, dtype) = b.device.type, autocast
        devices = [b.device] if device == "cuda" else []
        self._replaying = True
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices, enabled=call.up_projections[0].kind == "experts"),
                torch.autocast(device, dtype=dtype, enabled=enabled),
            ):
                shape = batch.input_ids.shape
                batch.sums[module] = call_sums(call, b.detach(), shape, batch.segments, config, batch.scales)
        finally:
            self._replaying = False


class StepRecorder:
    """What the optimizer of a training really does to W_up in one update: the weights before it against those after.

    Under LoRA it is the merged weight, `W + scaling * B A`, that is compared.

    Args:
        model: what is trained.
        config: which layers, and which norm; its update, lr, eps and weight_decay are the optimizer's own.

    Raises:
        InputError: an up-projection is a stack of experts under LoRA, or has another adapter than LoRA, such as DoRA;
            or none is trained.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig) -> None:
        self._up_projections = find_up_projections(model, config.n_layers, config.up_projection)
        self._config = config
        self._before: list[Tensor] = []
        for each in self._up_projections:
            _check_adapters(each)
        if not any(p.requires_grad for each in self._up_projections for p in (each.parameter, *_adapters(each))):
            raise InputError(
                "update='optimizer' sees no change: no measured up-projection is trained, nor has an adapter that is. "
                "Use update='adamw', which needs its gradient only."
            )

    def before(self) -> None:
        """Remember the weights."""
        self._before = [_merged(each).clone() for each in self._up_projections]

    def after(self) -> np.ndarray:
        """(L,) how far each measured layer has moved since, in the unit of the weights."""
        changes = [_merged(each) - old for each, old in zip(self._up_projections, self._before, strict=True)]
        self._before = []
        return np.array(layer_values(self._up_projections, changes, self._config))


def recorders(model: nn.Module, config: ResonanceConfig, samples: int) -> tuple[TrainingRecorder, StepRecorder | None]:
    """What measures a run: each sample in the backward, or, for an update without a closed form, the weights.

    Args:
        model: what is trained.
        config: which step is measured and how.
        samples: the samples of a step, over all processes.

    Raises:
        InputError: the optimizer's own step is wanted of several samples together.
    """
    if UPDATES[config.update].step is not None:
        return TrainingRecorder(model, config), None
    if samples != 1:
        raise InputError(
            f"update='optimizer' sees one change for a whole update, and yours has {samples} samples (batch x "
            "accumulation x processes). Make it 1, or use update='adamw'."
        )
    return TrainingRecorder(model, None), StepRecorder(model, config)


def _check_adapters(each: UpProjection) -> None:
    module: Any = each.module
    if not hasattr(module, "lora_A"):
        if _adapters(each):
            raise InputError(f"update='optimizer' cannot merge LoRA into the experts of '{each.name}'. {CLOSED_FORM}")
        return
    if module.lora_variant:
        kinds = ", ".join(sorted(type(variant).__name__ for variant in module.lora_variant.values()))
        raise InputError(f"update='optimizer' cannot merge {kinds} of '{each.name}', only plain LoRA. {CLOSED_FORM}")


def _adapters(each: UpProjection) -> list[nn.Parameter]:
    return [parameter for name, parameter in each.module.named_parameters() if "lora_" in name]


@torch.no_grad()
def _merged(each: UpProjection) -> Tensor:
    """The up-projection's weight, adapters included."""
    module: Any = each.module
    weight = at_least_float32(each.plain_weight())
    if hasattr(module, "lora_A") and not module.merged and not module.disable_adapters:
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                weight = weight + each.up(at_least_float32(module.get_delta_weight(adapter)))
    return weight


def _same(mine: Tensor, given: Any) -> bool:
    """Whether a model is given this batch: the very tensor, or the copy that DDP makes."""
    if not isinstance(given, Tensor) or given.shape != mine.shape:
        return False
    return given.data_ptr() == mine.data_ptr() or torch.equal(given, mine)


@torch.no_grad()
def _mean_losses(output: Any, batch: MicroBatch) -> Tensor | None:
    """(N,) each sample's mean token loss, from the log-probabilities that TRL computes or from the logits."""
    log_probs, logits = getattr(output, "log_probs", None), getattr(output, "logits", None)
    if log_probs is not None:
        per_token = -log_probs.double()
    elif logits is not None:
        learnt = batch.labels[:, 1:] != IGNORE
        losses = F.cross_entropy(
            at_least_float32(logits[:, :-1][learnt]), batch.labels[:, 1:][learnt], reduction="none"
        )
        per_token = torch.zeros(learnt.shape, dtype=torch.float64, device=losses.device)
        per_token[learnt] = losses.double()
    else:
        return None
    sums = [
        per_token[each.row, max(each.tokens.start - 1, 0) : max(each.tokens.stop - 1, 0)] for each in batch.segments
    ]
    return torch.stack([each.sum() for each in sums]) / batch.num_tokens.clamp(min=1)

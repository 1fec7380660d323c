"""The scores of the samples that a training run trains on, from the run's own backward.

Knows models and batches, not the trainer or the dataset. It only watches: it writes no gradient, draws no random number
and changes no weight, so training with it is bit-identical to training without it.

    expect -> [forward: a, loss | backward: b -> each sample: scale * b^T a -> update -> sum] x micro-batches -> take

The loss of a step is a weighted sum over the tokens of all its samples. The gradient of a sample's own mean loss is
therefore its share of the gradient, divided by that weight and by its number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError, ResonanceConfig
from ..config.compatibility import has
from .effective import check_maps, effective_weight
from .gradients import Segment
from .head import PIECE_LOGITS, losses_in_pieces
from .loss_check import LossCheck, TokenLoss, Verdict, field_of, verdicts
from .losses import IGNORE, unwrapped
from .modes import at_least_float32
from .recorder import Call, call_sums
from .resonance import Resonance, layer_values
from .unreached import not_called, used_twice
from .up_projection import UpProjection, find_up_projections
from .updates import UPDATES, closed_form, size_of_change, unchanged_sum

NO_GRADIENT = (
    "A training step was not measured: its loss has no gradient at any measured up-projection. Measure lower layers "
    "with a larger n_layers, or compute the loss from the model's own logits."
)
NOT_APART = (
    "The router's auxiliary loss is the batch's, and to take it out of the rows' scores needs a second backward, which "
    "failed: {error}. Leave out activation_offloading=True and selective or reentrant checkpointing; or the auxiliary "
    "loss, with router_aux_loss_coef=0 or model.config.output_router_logits=False; or pass when='before'."
)
NOT_SEEN = (
    "A training step was not measured: the model was not called with the batch's input_ids. Leave them as the collator "
    "made them, and the model as it was when training began."
)


@dataclass(eq=False)
class MicroBatch:
    """One expected forward and backward, and what was measured of it.

    Attributes:
        input_ids: (B, T), the input of the model.
        labels: (B, T), -100 for tokens that are not learnt.
        segments: the N samples in it.
        token_weight: the expected weight of every token's loss in the loss of the step.
        form: the expected loss of one token.
        sums: what each hooked module adds to each sample's sum, (N,).
        aside: the gradient of the model's auxiliary loss at the output of each hooked module.
        losses: (N,) each sample's mean token loss; None if the output of the model does not show it.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Sequence[Segment]
    token_weight: float | Tensor
    form: TokenLoss = field(default_factory=TokenLoss)
    sums: dict[nn.Module, Tensor] = field(default_factory=dict)
    aside: dict[nn.Module, Tensor] = field(default_factory=dict)
    losses: Tensor | None = None

    @cached_property
    def num_tokens(self) -> Tensor:
        """(N,) the number of learnt tokens of each sample."""
        learnt = self.labels != IGNORE
        learnt[:, 0] = False
        return torch.stack([learnt[each.row, each.tokens].sum() for each in self.segments])

    @cached_property
    def check(self) -> LossCheck:
        """What finds the true weights of the tokens."""
        return LossCheck(self.input_ids, self.labels, self.segments, self.token_weight, self.form)

    @cached_property
    def scales(self) -> Tensor:
        """(N,) the factor from a sample's share of the loss to its own mean loss, known once the backward reaches it.

        The weights are the expected ones, exactly, unless the backward shows others.
        """
        tokens = self.num_tokens.clamp(min=1)
        expected = 1 / (self.token_weight * tokens)
        if self.check.own is None:
            return expected
        return torch.where(self.check.own, (1 / (self.check.weight * tokens)).to(expected.dtype), expected)

    def of_tokens(self, module: nn.Module, b: Tensor) -> Tensor:
        """The part of a gradient at a module's output that the tokens' losses make, without the auxiliary loss's."""
        weight, aside = self.check.aux_weight, self.aside.get(module)
        if weight is None or aside is None:
            return b
        own = (at_least_float32(b) - weight * at_least_float32(aside)).view(*self.input_ids.shape, -1)
        for each in self.segments:  # exactly zero where no learnt token follows
            learnt = (self.labels[each.row, each.tokens] != IGNORE).long()
            follows = learnt.sum() > learnt.cumsum(0)
            own[each.row, each.tokens] *= follows[:, None].to(own)
        return own.to(b.dtype).view_as(b)


class TrainingRecorder:
    """Measures what `Recorder` measures, at the weights and in the mode of the training run that it watches.

    Args:
        model: the model in training, wrapped by PEFT or not, but neither compiled nor wrapped for several processes.
        config: the step to measure, and how; None to measure the losses only.

    Raises:
        InputError: the model has no known up-projection, or uses one twice in a forward pass; or the update is
            `"optimizer"`.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig | None) -> None:
        self.model, self.config = model, config
        self._modules: dict[nn.Module, list[UpProjection]] = {}
        if config is not None:
            closed_form(config)  # refuses an update that has none
            up_projections = find_up_projections(model, config.n_layers, config.up_projection)
            check_maps(up_projections)
            self._layers = sorted({each.layer for each in up_projections})
            for each in up_projections:
                self._modules.setdefault(each.module, []).append(each)
        self._expected: list[MicroBatch] = []
        self._running: MicroBatch | None = None
        self._begun: list[MicroBatch] = []
        self._called: dict[MicroBatch, set[nn.Module]] = {}
        self._outputs: dict[nn.Module, Tensor] | None = None  # of the hooked modules, while a forward runs
        self._replaying = False
        self._hidden: Tensor | None = None
        self._stack = contextlib.ExitStack()

    def attach(self) -> None:
        """Register the hooks."""
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, with_kwargs=True),
            *(module.register_forward_hook(self._catch, with_kwargs=True) for module in self._modules),
        ]
        if not has("one nll"):
            hooks.append(unwrapped(self.model).base_model.register_forward_hook(self._see_hidden))
        for hook in hooks:
            self._stack.callback(hook.remove)

    def detach(self) -> None:
        """Remove the hooks."""
        self._stack.close()
        self.expect([])

    def expect(self, batches: Sequence[MicroBatch]) -> None:
        """Set the next micro-batches. A forward on anything else is not measured."""
        self._expected, self._begun, self._running, self._called = list(batches), [], None, {}

    @contextlib.contextmanager
    def backpropagating(self, loss: Tensor) -> Iterator[None]:
        """A context in which the gradient of a loss, of the micro-batch of the last forward, is computed."""
        batch = self._begun[-1] if self._begun and self.config is not None else None
        if batch is not None:
            batch.check.backpropagates(loss)
        with _second_backward() if batch is not None and batch.aside else contextlib.nullcontext():
            yield

    def verdicts(self) -> list[Verdict]:
        """How the losses of the expected micro-batches differ from what is expected, once the backward is over."""
        return [] if self.config is None else verdicts([each.check for each in self._expected])

    def take(self) -> list[Resonance]:
        """The measurements of the expected micro-batches, in order. Clears the list of expected micro-batches.

        Raises:
            InputError: a micro-batch with learnt tokens was not measured; it says why.
        """
        batches, called, begun = self._expected, self._called, self._begun
        self.expect([])
        if self.config is not None:
            for each in batches:
                if each not in begun:
                    raise InputError(NOT_SEEN)
                unreached = [module for module in self._modules if module not in called.get(each, ())]
                if unreached:
                    raise not_called(self.model, self._modules[unreached[0]][0])
                if not each.sums and each.num_tokens.any():
                    raise InputError(NO_GRADIENT)
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
            else:  # the loss does not depend on it, so it has no gradient and the optimizer skips it
                sums[:, column] += sum(unchanged_sum(each.entries, config) for each in up_projections)
        return size_of_change(sums, entries, config)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        coming = (each for each in self._expected if each not in self._begun and _same(each.input_ids, ids))
        self._running = next(coming, None)
        if self._running is not None:
            self._begun.append(self._running)
            self._outputs = {}

    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        batch, outputs, self._outputs = self._running, self._outputs, None
        if batch is None or not torch.is_grad_enabled():
            return
        losses = _token_losses(output, batch)
        if losses is None and self._hidden is not None:
            losses = _losses_after(self._hidden, unwrapped(model), batch)
        self._hidden = None
        batch.losses = None if losses is None else _mean_losses(losses, batch)
        if self.config is not None:
            batch.check.watch(output, losses, kwargs.get("num_items_in_batch"))
            aux = field_of(output, "aux_loss")
            if isinstance(aux, Tensor) and aux.requires_grad and outputs:
                batch.aside = self._gradients(aux, outputs)

    def _gradients(self, loss: Tensor, outputs: dict[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
        """The gradient of a loss at the outputs of modules; none where it does not depend on them."""
        self._replaying = True
        try:
            with _second_backward():
                found = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True)
        finally:
            self._replaying = False
        return {module: each for module, each in zip(outputs, found, strict=True) if each is not None}

    def _see_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep (B, T, H), of which SFTTrainer of TRL before 1.15 computes the loss without the model's head."""
        hidden = field_of(output, "last_hidden_state")
        if self._running is not None and torch.is_grad_enabled() and hidden is not None:
            self._hidden = hidden.detach()

    def _catch(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook. Gradient checkpointing calls it twice, but its backward passes here once."""
        if self._running is None or self._replaying or not torch.is_grad_enabled():
            return
        output = output[0] if isinstance(output, tuple) else output
        if not output.requires_grad:  # everything below is frozen, so the graph begins here
            output.requires_grad_()
        self._called.setdefault(self._running, set()).add(module)
        if self._outputs is not None:
            self._outputs[module] = output
        autocast = torch.is_autocast_enabled(output.device.type), torch.get_autocast_dtype(output.device.type)
        call = Call(self._modules[module], args, kwargs, None)  # with the graph, neither would be freed
        output.register_hook(partial(self._measure, self._running, call, autocast))

    def _measure(self, batch: MicroBatch, call: Call, autocast: tuple[bool, torch.dtype], b: Tensor) -> None:
        """Gradient hook."""
        if self._replaying:
            return
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
                b = batch.of_tokens(module, b.detach())
                batch.sums[module] = call_sums(call, b, shape, batch.segments, config, batch.scales)
        finally:
            self._replaying = False


class StepRecorder:
    """Measures what the run's own optimizer does to W_up in one step, by comparing the weights before and after.

    With an adapter, the weight is the effective one: for LoRA, `W + scaling * B A`.

    Args:
        model: the model in training.
        config: the layers and the norm.

    Raises:
        InputError: the map of an adapted up-projection is not a matrix; or no up-projection is trained.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig) -> None:
        self._up_projections = find_up_projections(model, config.n_layers, config.up_projection)
        self._config = config
        self._before: list[Tensor] = []
        check_maps(self._up_projections)
        if not any(_is_trained(each) for each in self._up_projections):
            raise InputError(
                "update='optimizer' sees no change: no measured up-projection is trained, and none has a trained "
                "adapter. Use update='adamw', which needs the gradient only."
            )

    def before(self) -> None:
        """Store the weights before the step."""
        self._before = [_effective(each).clone() for each in self._up_projections]

    def after(self) -> np.ndarray:
        """(L,) the change of each measured layer since `before`, in the unit of the weights."""
        changes = [_effective(each) - old for each, old in zip(self._up_projections, self._before, strict=True)]
        self._before = []
        return np.array(layer_values(self._up_projections, changes, self._config))


def recorders(model: nn.Module, config: ResonanceConfig, samples: int) -> tuple[TrainingRecorder, StepRecorder | None]:
    """The recorders of a run: of each sample's gradient, or for an update without a closed form of the weights.

    Args:
        model: the model in training.
        config: the step to measure, and how.
        samples: the number of samples of a step, over all processes.

    Raises:
        InputError: the update has no closed form, and a step has several samples.
    """
    if UPDATES[config.update].step is not None:
        return TrainingRecorder(model, config), None
    if samples != 1:
        raise InputError(
            f"update='optimizer' sees one change for a whole step, and yours has {samples} samples (batch x "
            "accumulation x processes). Use 1 sample, or update='adamw'."
        )
    return TrainingRecorder(model, None), StepRecorder(model, config)


@contextlib.contextmanager
def _second_backward() -> Iterator[None]:
    """A context in which the graph of a forward is passed once more, which not every way to save memory allows."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # each raises its own
        said = str(error).splitlines() or [type(error).__name__]
        raise InputError(NOT_APART.format(error=said[0].rstrip("."))) from error


def _is_trained(each: UpProjection) -> bool:
    """Whether the optimizer changes the weight or an adapter around it."""
    adapters = {*each.outer.parameters()} - {*each.owner.parameters()}
    return any(parameter.requires_grad for parameter in (each.parameter, *adapters))


def _effective(each: UpProjection) -> Tensor:
    return at_least_float32(effective_weight(each))


def _same(mine: Tensor, given: Any) -> bool:
    """Whether a model's input is this batch: the same tensor, or the copy that DDP makes."""
    if not isinstance(given, Tensor) or given.shape != mine.shape:
        return False
    return given.data_ptr() == mine.data_ptr() or torch.equal(given, mine)


@torch.no_grad()
def _losses_after(hidden: Tensor, model: Any, batch: MicroBatch) -> Tensor | None:
    """(B, T - 1) the cross entropy of each learnt token from the decoder's output, as TRL before 1.15 computes it."""
    if hidden.shape[:2] != batch.labels.shape:  # an adapter has added tokens
        return None
    config, head = model.config, model.get_output_embeddings()
    scale, cap = getattr(config, "logit_scale", 1.0), getattr(config, "final_logit_softcapping", None)

    def logits(own: Tensor) -> Tensor:
        found = at_least_float32(F.linear(own.to(head.weight.dtype), head.weight, head.bias)) * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    learnt = (batch.labels[:, 1:] != IGNORE).to(hidden.device)
    targets = batch.labels[:, 1:].to(hidden.device)[learnt]
    size = max(PIECE_LOGITS // len(head.weight), 1)
    losses, _ = losses_in_pieces(hidden[:, :-1][learnt], logits, targets, None, size)
    per_token = losses.double().new_zeros(learnt.shape).masked_scatter(learnt, losses.double())
    return per_token.to(batch.labels.device)


@torch.no_grad()
def _token_losses(output: Any, batch: MicroBatch) -> Tensor | None:
    """(B, T - 1) the cross entropy of each learnt token, from TRL's log-probabilities or from logits of all tokens."""
    log_probs, logits = field_of(output, "log_probs"), field_of(output, "logits")
    if log_probs is not None:
        return -log_probs.double()
    if logits is None or logits.shape[:-1] != batch.labels.shape:
        return None
    learnt = (batch.labels[:, 1:] != IGNORE).to(logits.device)
    targets = batch.labels[:, 1:].to(logits.device)[learnt]
    losses = F.cross_entropy(at_least_float32(logits[:, :-1][learnt]), targets, reduction="none")
    per_token = torch.zeros(learnt.shape, dtype=torch.float64, device=losses.device)
    per_token[learnt] = losses.double()
    return per_token.to(batch.labels.device)


def _mean_losses(per_token: Tensor, batch: MicroBatch) -> Tensor:
    """(N,) each sample's mean token loss, given (B, T - 1) token losses."""
    sums = [
        per_token[each.row, max(each.tokens.start - 1, 0) : max(each.tokens.stop - 1, 0)] for each in batch.segments
    ]
    return torch.stack([each.sum() for each in sums]) / batch.num_tokens.clamp(min=1)

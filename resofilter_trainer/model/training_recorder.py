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
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import InputError, ResonanceConfig
from ..config.compatibility import has
from .effective import check_maps
from .float32 import HALF
from .loss_check import Verdict, field_of, verdicts
from .losses import unwrapped
from .micro_batch import MicroBatch, losses_after, mean_losses, token_losses
from .quantised import bits_of
from .recorder import Call, call_sums
from .resonance import Resonance
from .sharding import is_sharded
from .unreached import not_called, used_twice
from .up_projection import UpProjection, find_up_projections
from .updates import closed_form, size_of_change, unchanged_sum
from .zero3 import is_absent, is_divided

NO_GRADIENT = (
    "A training step was not measured: its loss has no gradient at any measured up-projection. Measure lower layers "
    "with a larger n_layers, or compute the loss from the model's own logits."
)
NOT_APART = (
    "The router's auxiliary loss is the batch's, and to take it out of the rows' scores needs a second backward, which "
    "failed: {error}. Leave out activation_offloading=True and selective or reentrant checkpointing; or the auxiliary "
    "loss, with router_aux_loss_coef=0 or model.config.output_router_logits=False; or pass when='before'."
)
NOT_APART_IN_SHARDS = (
    "The router's auxiliary loss is the batch's, and to take it out of the rows' scores needs a second backward, which "
    "a sharded model has no place for. Leave it out, with router_aux_loss_coef=0 or "
    "model.config.output_router_logits=False; or score first, with score_dataset(..., sharded=True)."
)
NOT_WHOLE = (
    "'{}' is sharded while its gradient is computed, so its weight cannot be decayed. Let FSDP2 wrap the decoder's "
    "layers (auto_wrap_policy='TRANSFORMER_BASED_WRAP')."
)
NOT_UNDER_ZERO_3 = (
    "'{}' {}, and under DeepSpeed's ZeRO-3 only one weight at a time is whole. Use ZeRO-2, or FSDP2 "
    "(fsdp_config={{'fsdp_version': 2}})."
)
CHECKPOINTING = "gradient_checkpointing"  # transformers' attribute of a layer
NOT_SEEN = (
    "A training step was not measured: the model was not called with the batch's input_ids. Leave them as the collator "
    "made them, and the model as it was when training began."
)


class TrainingRecorder:
    """Measures what `Recorder` measures, at the weights and in the mode of the training run that it watches.

    Args:
        model: the model in training, wrapped by PEFT or not, but not for several processes, nor as a compiled module.
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
            _refuse_under_zero_3(up_projections)
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
        self._hidden: tuple[Tensor, tuple[bool, torch.dtype]] | None = None
        self._stack = contextlib.ExitStack()

    def attach(self, compiled: bool = False) -> None:
        """Register the hooks.

        Args:
            compiled: whether torch.compile makes graphs of the model. They then end at every hook, which runs between
                them. What was compiled before is compiled anew, as torch does not notice hooks that are added.
        """
        outside: Any = torch.compiler.disable if compiled else lambda hook: hook
        if compiled:
            torch.compiler.reset()
            self._stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))
        begin, end, catch, see = map(outside, (self._begin, self._end, self._catch, self._see_hidden))
        hooks = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end, with_kwargs=True),
        ]
        for module, measured in self._modules.items():
            # before ZeRO-3's, which thus has the weight whole when the gradient arrives
            first = any(is_divided(each.parameter) for each in measured)
            hooks.append(module.register_forward_hook(catch, with_kwargs=True, prepend=first))
        if not has("one nll"):
            hooks.append(unwrapped(self.model).base_model.register_forward_hook(see))
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

    def measured(self) -> list[Resonance]:
        """What is measured of the expected micro-batches so far, in order."""
        return [self._result(each) for each in self._expected]

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
        losses = token_losses(output, batch)
        coarse = False
        if losses is None and self._hidden is not None:
            hidden, (enabled, dtype) = self._hidden
            coarse = enabled or hidden.dtype in HALF
            with torch.autocast(hidden.device.type, dtype=dtype, enabled=enabled):
                losses = losses_after(hidden, unwrapped(model), batch)
        self._hidden = None
        batch.losses = None if losses is None else mean_losses(losses, batch)
        if self.config is not None:
            aux = field_of(output, "aux_loss")
            if isinstance(aux, Tensor) and aux.requires_grad and outputs is not None:
                if is_sharded(model):
                    raise InputError(NOT_APART_IN_SHARDS)
                batch.aside = self._gradients(aux, outputs)  # before the run's own backward is watched
            batch.check.watch(output, losses, kwargs.get("num_items_in_batch"), coarse)

    def _gradients(self, loss: Tensor, outputs: dict[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
        """The gradient of a loss at the outputs of modules; none where it does not depend on them."""
        if self._modules.keys() - outputs.keys():
            if any(vars(each).get(CHECKPOINTING) for each in self.model.modules()):
                raise InputError(NOT_APART.format(error="checkpointing hides the outputs of its layers"))
            return {}  # a module that was not called is refused in the end
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
            self._hidden = hidden.detach(), _autocast_of(hidden)

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
        call = Call(self._modules[module], args, kwargs, None)  # with the graph, neither would be freed
        output.register_hook(partial(self._measure, self._running, call, _autocast_of(output)))

    def _measure(self, batch: MicroBatch, call: Call, autocast: tuple[bool, torch.dtype], b: Tensor) -> None:
        """Gradient hook."""
        if self._replaying:
            return
        module, config = call.up_projections[0].module, self.config
        assert config is not None
        if module in batch.sums:
            raise used_twice(call.up_projections[0])
        for each in call.up_projections:
            if isinstance(each.parameter, DTensor) or is_absent(each.parameter):
                raise InputError(NOT_WHOLE.format(each.name))
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
                batch.sums[module] = call_sums(call, b, shape, batch.segments, [config], batch.scales)[0]
        finally:
            self._replaying = False


def _refuse_under_zero_3(up_projections: Sequence[UpProjection]) -> None:
    """Raise InputError for a divided weight whose step depends on more than that weight."""
    for each in up_projections:
        unfit = {
            "has an adapter": each.adapted,
            "sees only the tokens routed to it": each.kind == "experts",
            "is quantised": bits_of(each.parameter) is not None,
        }
        reason = next((reason for reason, applies in unfit.items() if applies), None)
        if is_divided(each.parameter) and reason is not None:
            raise InputError(NOT_UNDER_ZERO_3.format(each.name, reason))


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


def _autocast_of(tensor: Tensor) -> tuple[bool, torch.dtype]:
    """Whether autocast is on, and its type, on a tensor's device."""
    return torch.is_autocast_enabled(tensor.device.type), torch.get_autocast_dtype(tensor.device.type)


def _same(mine: Tensor, given: Any) -> bool:
    """Whether a model's input is this batch: the same tensor, or the copy that DDP makes."""
    if not isinstance(given, Tensor) or given.shape != mine.shape:
        return False
    return given.data_ptr() == mine.data_ptr() or torch.equal(given, mine)

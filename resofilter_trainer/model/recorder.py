"""The score for whole batches, from one shared backward. Knows nothing of datasets, files or trainers.

    forward    ... layer L-3 [a | out] ... layer L-1 [a | out] -> hidden at learnt positions -> losses, gradient
    backward                 b <- ...................... b <-         <- .................................. <-
    each sample: b^T a, a tile at a time -> update -> sum

The backward stops at the lowest measured up-projection. It computes no parameter's gradient, draws no random number and
leaves the model unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import DTensor

from ..config import InputError, ResonanceConfig
from .effective import check_maps, effective_weight, standing_in
from .gradients import (
    Segment,
    block_gradients,
    gram_is_cheaper,
    input_of,
    is_token_by_token,
    runs_of,
    segments_of,
    spans,
    squared_norm,
    tiles,
)
from .head import Decoded
from .hidden_means import Decoder, HiddenMeans
from .lean_forward import LeanForward
from .losses import Inputs, learnt_positions, sample_means, unpacked
from .modes import at_least_float32, evaluating, own_precision, requiring_grad
from .resonance import Resonance
from .signal_trial import why_not
from .signals import HIDDEN, LAYERS, MEASURED, PARTS, Measures, Tokens, chosen_signals, impossible_signals
from .unreached import DETACHED, is_used, not_called, not_token_by_token, used_twice
from .up_projection import UpProjection, find_up_projections
from .updates import UPDATES, closed_form, size_of_change, tile_sum, unchanged_sum


class Recorder:
    """Measures the samples of a batch of any size as `literal` measures them one by one.

    A context manager in which the model's parameters are frozen and its dropout is off.

    >>> with Recorder(model, ResonanceConfig()) as record:
    ...     measured = record(batch)    # measured.score: (B,)

    Args:
        model: a causal language model in float32, float64 or bfloat16. Products are in float32, or in float64 for a
            float64 model; a bfloat16 forward, by weights or by autocast, adds no noise but its own. All processes of a
            sharded model must measure at the same time, see `in_step`.
        config: the step to measure, and how.
        signals: further signals to measure on the way: their names, or `"all"` (see `signals.py`). Those that are made
            from the scores of all rows are left to the pass.

    Attributes:
        left_out: on entry, the signals of `"all"` that this model cannot give, by name, with the reason.

    Raises:
        InputError: the model has no known up-projection, or one that is offloaded or sharded by other means than
            `shard`; or the update is `"optimizer"`; or a signal is not known, or, on entry, this model cannot give it.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig, signals: str | Iterable[str] | None = None) -> None:
        closed_form(config)  # refuses an update that has none
        self._asked = chosen_signals(signals, parts=PARTS)
        self._measures = Measures((), config)
        self.left_out: dict[str, str] = {}
        self.model = model
        self.config = config
        up_projections = find_up_projections(model, config.n_layers, config.up_projection)
        self.layer_indices = sorted({each.layer for each in up_projections})
        check_maps(up_projections)
        self._modules: dict[nn.Module, list[UpProjection]] = {}
        self._entries = np.zeros(len(self.layer_indices), dtype=np.int64)
        for each in up_projections:
            self._modules.setdefault(each.module, []).append(each)
            self._entries[self._column(each)] += each.entries
            if each.parameter.device.type == "meta":
                raise InputError(
                    f"'{each.name}' is offloaded, so its weight is not in memory when it is measured. Place the last "
                    f"{config.n_layers} layers on a device with device_map."
                )
            if isinstance(each.parameter, DTensor):
                raise InputError(
                    f"'{each.name}' is sharded, so its weight is not in memory when it is measured. Pass the model as "
                    "it was loaded and shard it with resofilter_trainer.model.sharding.shard, which keeps the measured "
                    "weights whole."
                )
        self._calls: dict[nn.Module, Call] | None = None
        self._skipped: set[nn.Module] = set()  # that the forward is known not to use
        lowest, last = self.layer_indices[0], self.layer_indices[-1]
        self._decoder = Decoder.of(model)
        layers = self._decoder.layers
        blocks = {each.block: None for each in up_projections if each.layer == last}
        self._forward = LeanForward(model, layers[:lowest], layers[lowest], list(blocks))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(requiring_grad(self.model.parameters(), False))
            for module, up_projections in self._modules.items():
                hook = partial(self._catch, up_projections)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._choose_signals()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.forget()

    def _choose_signals(self) -> None:
        """Leave out of all signals those that this model cannot give."""
        needs = Measures(self._asked, self.config).needs
        reasons = why_not(self.model, self._decoder, needs)
        if len(self.layer_indices) == 1:
            reasons[LAYERS] = "only one layer is measured (n_layers=1)"
        self.left_out = impossible_signals(self._asked, reasons)
        measured = (name for name in self._asked if name not in self.left_out and not MEASURED[name].of_layers)
        self._measures = Measures(tuple(measured), self.config)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The measured weights, with their adapters."""
        measured = [each for all_ in self._modules.values() for each in all_]
        adapters = [parameter for each in measured if each.adapted for parameter in each.outer.parameters()]
        return [*(each.parameter for each in measured), *adapters]

    @property
    def signals(self) -> tuple[str, ...]:
        """The names of the signals that are measured."""
        return self._measures.names

    @property
    def may_share(self) -> bool:
        """False once it is known that rows cannot share the work of a common prefix."""
        return self._forward.may_share

    @property
    def in_step(self) -> bool:
        """Whether the model is sharded, so that all processes must measure the same number of batches together."""
        return self._forward.in_step

    def forget(self) -> None:
        """Free what is cached from earlier batches, before the weights or the precision (autocast) change."""
        self._forward.forget()

    def try_sharing(self, row: Mapping[str, Tensor]) -> None:
        """Test on one row whether rows can share a prefix; otherwise the first batch with a prefix decides."""
        with own_precision(self.model):
            self._forward.try_sharing(row)

    def __call__(self, batch: Mapping[str, Tensor], shared: int | None = None) -> Resonance:
        """Measure a batch.

        Args:
            batch: `input_ids`, `attention_mask` and `labels`, each (B, T), padded on either side; or padding-free,
                (1, T) each, with `position_ids` instead of the mask. Each sample in it is measured.
            shared: the length of the prefix that this batch shares with others, if known.

        Returns:
            The measurements of the B samples, in the order of the batch.

        Raises:
            InputError: the forward pass calls an up-projection twice; or calls none, or uses the weight of one without
                calling it, as compiled models and fused kernels do.
        """
        batch = batch if "attention_mask" in batch else unpacked(batch)
        learnt = learnt_positions(batch["labels"])
        num_tokens = learnt.sum(1)
        with torch.enable_grad(), own_precision(self.model):
            inputs = self._forward.inputs(batch)
            counts = num_tokens.cpu().numpy()
            means = None
            if HIDDEN in self._measures.needs:
                means = HiddenMeans(self._decoder, inputs, counts.tolist())
            decoded, calls = self._run(inputs, batch["attention_mask"].sum(1), shared, means)
            shares = (1 / num_tokens.clamp(min=1).double())[learnt.nonzero()[:, 0]]
            statistics, forms = self._measures.statistics(counts.tolist()), self._measures.forms
            token_losses, gradient = decoded.losses_and_gradient(shares, statistics)
            if not decoded.hidden.requires_grad:
                raise InputError(DETACHED)
            outputs = [call.output for call in calls.values() if call.output is not None]
            gradients = torch.autograd.grad(decoded.hidden, outputs, gradient, allow_unused=True)
            whole = inputs.shape, segments_of({"attention_mask": batch["attention_mask"][:, : inputs.shape[1]]})
            learnt_only = torch.Size([1, len(inputs.index)]), runs_of(num_tokens)
            sums = np.zeros((len(forms), len(learnt), len(self._entries)))
            for call, b in zip(calls.values(), gradients, strict=True):
                places = learnt_only if call.up_projections[0].block in self._forward.narrowed else whole
                sums[..., self._column(call.up_projections[0])] += self._call_sums(call, b, *places)
            for module in self._modules.keys() - calls.keys():
                sums[..., self._column(self._modules[module][0])] += self._unchanged(self._modules[module])
        loss = sample_means(token_losses.to(learnt.device), learnt).cpu().numpy()
        layers = [size_of_change(own, self._entries, form) for own, form in zip(sums, forms, strict=True)]
        hidden = np.empty(0) if means is None else means.means()
        tokens = None if statistics is None else Tokens.of(statistics, counts, decoded.vocabulary, hidden)
        signals = self._measures.of_rows(loss, np.stack(layers).mean(2), tokens)
        return Resonance(loss, counts, layers[0], signals)

    def _run(
        self, inputs: Inputs, lengths: Tensor, shared: int | None, means: HiddenMeans | None
    ) -> tuple[Decoded, dict[nn.Module, Call]]:
        """Run the model and record the calls of the up-projections."""
        calls: dict[nn.Module, Call] = {}
        with self._forward.prepare(inputs, lengths, shared, means):
            self._calls = calls
            try:
                decoded = self._forward.run(inputs)
            finally:
                self._calls = None
        unreached = self._modules.keys() - calls.keys()
        if unreached and not (calls and self._are_skipped(unreached, inputs)):
            first = next(module for module in self._modules if module in unreached)
            raise not_called(self.model, self._modules[first][0])
        return decoded, calls

    def _are_skipped(self, unreached: Set[nn.Module], inputs: Inputs) -> bool:
        """Whether the forward computes without the weights of these modules, as layers that are left out do."""
        if not self._skipped.issuperset(unreached):
            measured = [each for module in unreached for each in self._modules[module]]
            stored = [parameter for each in measured for parameter in (each.parameter, *each.outer.parameters())]
            if is_used(stored, lambda: self._forward.run(inputs).hidden):
                return False
            self._skipped.update(unreached)
        return True

    def _call_sums(self, call: Call, b: Tensor | None, shape: torch.Size, segments: Sequence[Segment]) -> np.ndarray:
        if b is None:  # the loss does not depend on it
            return self._unchanged(call.up_projections)
        return call_sums(call, b, shape, segments, self._measures.forms).cpu().numpy()

    def _unchanged(self, up_projections: Sequence[UpProjection]) -> np.ndarray:
        """(F, 1): without a gradient, an optimizer skips the weight."""
        entries = [each.entries for each in up_projections]
        return np.array([[sum(unchanged_sum(each, form) for each in entries)] for form in self._measures.forms])

    def _catch(
        self, up_projections: list[UpProjection], module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook. The graph begins at this output if nothing below it needs a gradient."""
        if self._calls is None:
            return None
        if module in self._calls:
            raise used_twice(up_projections[0])
        first, *others = output if isinstance(output, tuple) else (output,)
        if not first.requires_grad:
            first = first.detach().requires_grad_().clone()  # a leaf could not be changed in place
        self._calls[module] = Call(up_projections, args, kwargs, get_gradient_edge(first))
        return (first, *others) if isinstance(output, tuple) else first

    def _column(self, each: UpProjection) -> int:
        return self.layer_indices.index(each.layer)


@dataclass(frozen=True)
class Call:
    """One call of a hooked module: its up-projections, its arguments, and its output in the graph unless hooked."""

    up_projections: Sequence[UpProjection]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: GradientEdge | None


def call_sums(
    call: Call,
    b: Tensor,
    shape: torch.Size,
    segments: Sequence[Segment],
    forms: Sequence[ResonanceConfig],
    scales: Tensor | None = None,
) -> Tensor:
    """What one call adds to each sample's sum, (F, N) float64 for `size_of_change`.

    Args:
        call: the call of the hooked module.
        b: the loss gradient at its output, (B, T, O) or flattened.
        shape: the shape (B, T) of the batch.
        segments: the N samples.
        forms: the F steps to measure, and how; of all but the first, the change is the gradient.
        scales: (N,), a factor for each sample's gradient if the loss is not the sum of the samples' mean losses.
    """
    if b.shape[:-1] not in (shape, (shape.numel(),)):
        what = f"it runs on tokens of shape {tuple(b.shape[:-1])} in a batch of {tuple(shape)}"
        raise not_token_by_token(call.up_projections[0], what)
    b = b.reshape(*shape, -1)  # OPT and others flatten (B, T) before the feed-forward
    runs = spans(b, segments)
    factors = [None] * len(runs) if scales is None else list(scales)
    if call.up_projections[0].kind == "experts":
        return _block_sums(call, b, runs, factors, forms)
    a = input_of(call.args, call.kwargs).detach().reshape(*shape, -1)
    with torch.autocast(b.device.type, enabled=False):
        return _linear_sums(call.up_projections[0], a, b, runs, factors, forms)


def _linear_sums(
    each: UpProjection,
    a: Tensor,
    b: Tensor,
    runs: Sequence[Segment],
    factors: Sequence[Tensor | None],
    forms: Sequence[ResonanceConfig],
) -> Tensor:
    a, b = at_least_float32(a), at_least_float32(b[..., each.outputs])
    weight = _weight_to_decay(each, forms[0])
    sums = []
    for run, factor in zip(runs, factors, strict=True):
        own_a, own_b = a[run.row, run.tokens], b[run.row, run.tokens]
        if factor is not None:
            own_b = own_b * factor
        if each.kind == "conv1d":
            own_a, own_b = own_b, own_a  # its weight is (I, O)
        cheaper = gram_is_cheaper(len(own_a), a.shape[-1], b.shape[-1])
        by_gram = [cheaper and UPDATES[form.update].is_gradient and form.norm == "l2" for form in forms]
        in_tiles = [form for form, gram in zip(forms, by_gram, strict=True) if not gram]
        found = _sums_in_tiles(own_a, own_b, weight, in_tiles) if in_tiles else []
        sums.append(torch.stack([squared_norm(own_a, own_b) if gram else found.pop(0) for gram in by_gram]))
    return torch.stack(sums, dim=1)


def _sums_in_tiles(a: Tensor, b: Tensor, weight: Tensor, forms: Sequence[ResonanceConfig]) -> list[Tensor]:
    """One sample's sum in each form, from `b^T a` a tile at a time."""
    of_tiles = [_tile_sums(gradient, weight[rows], forms) for rows, gradient in tiles(a, b)]
    return [torch.stack(of_form).sum() for of_form in zip(*of_tiles, strict=True)]


def _block_sums(
    call: Call, b: Tensor, runs: Sequence[Segment], factors: Sequence[Tensor | None], forms: Sequence[ResonanceConfig]
) -> Tensor:
    block = call.up_projections[0].module
    if forms[0].up_projection is not None and not is_token_by_token(block, call.args, call.kwargs, b.shape[:2]):
        raise not_token_by_token(call.up_projections[0], f"it is in a {type(block).__name__}, which mixes tokens")
    weights = [_weight_to_decay(each, forms[0]) for each in call.up_projections]
    sums = torch.zeros(len(forms), len(runs), dtype=torch.float64, device=b.device)
    with standing_in(call.up_projections) as parameters:
        for sample, (run, factor) in enumerate(zip(runs, factors, strict=True)):
            gradients = block_gradients(block, parameters, call.args, call.kwargs, b, run)
            for each, weight, gradient in zip(call.up_projections, weights, gradients, strict=True):
                # an expert of its own that no token reaches has none; in a stack of experts it has zeros
                own = torch.zeros_like(weight) if gradient is None else at_least_float32(each.up(gradient)).clone()
                own = own if factor is None else own.mul_(factor)
                sums[:, sample] += torch.stack(_tile_sums(own, weight, forms))
    return sums


def _tile_sums(gradient: Tensor, weight: Tensor, forms: Sequence[ResonanceConfig]) -> list[Tensor]:
    """`tile_sum` in each form; the first overwrites the gradient and comes last."""
    others = [tile_sum(gradient.clone(), weight, form) for form in forms[1:]]
    return [tile_sum(gradient, weight, forms[0]), *others]


def _weight_to_decay(each: UpProjection, config: ResonanceConfig) -> Tensor:
    """The effective weight; without weight decay the stored one, which is then not used."""
    decays = config.weight_decay and not UPDATES[config.update].is_gradient
    return at_least_float32(effective_weight(each) if decays else each.plain_weight())

"""Tokens whose loss is weighted by a rule, from the forward of each step. Knows TRL's outputs, no rows and no scores.

    forward -> log-probabilities, entropies -> rule -> weights -> log-probabilities times weights -> loss

Whatever else looks at the output of the model, such as the recorder, sees the weighted log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer

from ..config import InputError, share
from ..config.compatibility import need
from ..io.made_from import as_json
from ..model.gradients import segments_of
from ..model.losses import learnt_positions, vocabulary_of
from ..model.modes import at_least_float32
from ..selecting.named_rules import RULES, rule_of, token_rule
from ..selecting.results import NAME
from ..selecting.token_rules import ENTROPY, KNOWN, OF_OTHERS, TOP_ENTROPY, TokenInputs, TokenRule, ends_of_rows
from . import trainer_access as access
from .refused_uses import check_rule
from .resuming import TOKEN_RULE
from .step_weights import StepWeights
from .top_tiles import TopTiles

RuleLike = str | TokenRule | Callable[[TokenInputs], Any]
NOT_IN_A_RUN = dict.fromkeys(KNOWN, "SFTTrainer's forward does not compute it. Clean first (clean_dataset)")
NOT_IN_A_RUN |= dict.fromkeys(OF_OTHERS, "a run has one model. Clean first (clean_dataset)")
del NOT_IN_A_RUN[ENTROPY], NOT_IN_A_RUN[TOP_ENTROPY]
SOON = 100  # rows after which it is told that most of their end tokens are masked
NO_LOSSES = (
    "The trainer computes its loss without the log-probabilities of SFTTrainer's model, so the token rule '{}' cannot "
    "act. Clean first (clean_dataset), or leave the loss to SFTTrainer."
)


def rule_of_run(rule: RuleLike, keep: float | None, setting: str) -> TokenRule:
    """The rule that a run follows.

    Args:
        rule, keep: as for `clean_dataset`.
        setting: the name of the setting `keep`.

    Raises:
        InputError: there is no such rule, or a run does not have what it needs.
    """
    if keep is not None:
        share(setting, keep, "tokens")
        if not isinstance(rule, str):
            raise InputError(f"{setting}= goes with the name of a token rule: a rule of your own decides itself.")
    found = rule_of(rule, keep)
    found.check_needs(NOT_IN_A_RUN)
    if TOP_ENTROPY in found.needs:
        need("tiles of log_probs", f"The token rule '{found.name}' in a run")
    return found


class RuleWeights:
    """Lets a rule weigh the tokens of one training.

    Args:
        trainer, train_dataloader: the trainer and the loader that it iterates.
        rule: the rule; None to weigh nothing.
        means: a list to which the mean weight of each step is added.

    Raises:
        InputError: the trainer has another loss, or rows with weights of their own.
    """

    def __init__(self, trainer: Trainer, train_dataloader: Any, rule: TokenRule | None, means: list[float]) -> None:
        self._trainer, self._rule, self._loss, self._told = trainer, rule, None, False
        if rule is not None:
            check_rule(trainer, train_dataloader)
            self._step = StepWeights(trainer, f"The token rule '{rule.name}'", means)
            self._loss = RuleLoss(trainer, rule, self._step)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint says of it, where there is a rule."""
        rule = self._rule
        return {} if rule is None else as_json({TOKEN_RULE: {"rule": rule.name, "settings": rule.settings}})

    def acting(self) -> AbstractContextManager[None]:
        """A context in which the model's forward weighs: that of each loss of the training."""
        return nullcontext() if self._loss is None else self._loss.acting()

    def leaves_out(self) -> bool:
        """Before the optimizer's step: whether it is left out, as no token of the step has a weight above 0."""
        return self._loss is not None and self._step.leaves_out()

    def leave_out(self) -> None:
        """After `leaves_out`: let the optimizer leave its step out, if so."""
        if self._loss is not None:
            self._step.leave_out()

    def end_update(self) -> None:
        """The optimizer was asked for its step."""
        if self._loss is not None:
            self._step.end_update()

    def end_step(self) -> None:
        """The trainer has made its step."""
        if self._loss is not None:
            self._step.end_step()
            self._loss.end_step()
            if SOON <= self._step.ends < 2 * self._step.ends_masked:
                self.tell_of_ends()

    def tell_of_ends(self) -> None:
        """Say in the console, once, in how many rows the end token was not learnt, if in any."""
        if self._loss is None or self._told or not self._step.ends_masked:
            return
        self._told = True
        if self._trainer.args.process_index == 0:
            masked = f"masked the end token in {self._step.ends_masked:,} of {self._step.ends:,} rows so far"
            tqdm.write(
                f"{NAME}: the token rule '{self._loss.rule.name}' {masked}, which do not teach the model to stop"
            )


class RuleLoss:
    """Multiplies the log-probability of each learnt token by a rule's weight, while the model trains.

    Args:
        trainer: the trainer, whose model SFTTrainer has patched: its output has `log_probs` and `entropy`, (B, T - 1).
        rule: the rule.
        step: what adds up the weights.
    """

    def __init__(self, trainer: Trainer, rule: TokenRule, step: StepWeights) -> None:
        self._trainer, self.rule, self._step = trainer, rule, step
        self._model = cast(nn.Module, trainer.model)
        self._vocabulary = vocabulary_of(self._model)
        self._top = TopTiles(self._vocabulary) if TOP_ENTROPY in rule.needs else None
        self._number = 0  # of the micro-batch in its step
        self._seen = False  # whether the forward of the present loss had what is weighted

    @contextmanager
    def acting(self) -> Iterator[None]:
        """A context in which the model's forward weighs. The hook comes first: others see what is trained on."""
        model, self._seen = self._model, False
        handles = [model.register_forward_hook(self._weigh, with_kwargs=True, prepend=True)]
        if self._top is not None:
            handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        try:
            with nullcontext() if self._top is None else self._top.listening():
                yield
        finally:
            for each in handles:
                each.remove()
        if model.training and not self._seen:
            raise InputError(NO_LOSSES.format(self.rule.name))

    def end_step(self) -> None:
        """The next micro-batch is the first of a step."""
        self._number = 0

    def _begin(self, model: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        if self._top is not None and model.training and batch.get("labels") is not None:
            self._top.begin(learnt_positions(batch["labels"]))

    def _weigh(self, model: nn.Module, args: Any, batch: dict[str, Any], output: Any) -> None:
        if not model.training or getattr(output, "log_probs", None) is None:
            return
        self._seen = True
        learnt = learnt_positions(batch["labels"]).to(output.log_probs.device)
        if learnt.shape != output.log_probs.shape:
            raise InputError(
                f"The labels of a batch are {tuple(learnt.shape)}, the losses {tuple(output.log_probs.shape)}: the "
                "tokens of such a model cannot be weighed."
            )
        if not learnt.any():  # it only completes a step
            return
        inputs = self._inputs(batch, learnt, output)
        if not np.isfinite(inputs.loss).all():  # whatever the weights, the loss is no number: log and scaler see that
            self._step.add(np.nan, len(inputs))
            return
        weights = self._of_batch(len(inputs)).weights(inputs, some=False)
        self._number += 1
        tokens = batch["labels"][:, 1:].to(learnt.device)[learnt].cpu().numpy()
        last = ends_of_rows(tokens, inputs.offsets, access.end_token(self._trainer))
        self._step.add(float(weights.sum()), len(weights), (len(last), int((weights[last] == 0).sum())))
        found = torch.zeros_like(output.log_probs)
        found[learnt] = torch.from_numpy(weights).to(found)
        output.log_probs = output.log_probs * found

    def _of_batch(self, tokens: int) -> TokenRule:
        """The rule for a micro-batch: of a share, at least one token stays; random tokens are drawn anew."""
        rule, settings = self.rule, dict(self.rule.settings or {})
        if getattr(rule.weigh, "__module__", None) != token_rule.__module__ or rule.name not in RULES:
            return rule  # of the user's own
        changed: dict[str, Any] = {}
        if "keep" in settings and int(tokens * settings["keep"]) == 0:
            changed["keep"] = min(1.0, float(np.nextafter(1 / tokens, 1)))
        if rule.name == "random":
            state, process = self._trainer.state.global_step, self._trainer.args.process_index
            place = np.random.SeedSequence([settings["seed"], state, process, self._number])
            changed["seed"] = int(place.generate_state(1)[0])
        return token_rule(rule.name, **{**settings, **changed}) if changed else rule

    def _inputs(self, batch: dict[str, Any], learnt: Tensor, output: Any) -> TokenInputs:
        """What the output says of the learnt tokens, sample after sample."""
        samples = segments_of({name: value for name, value in batch.items() if value is not None})
        marks = learnt.cpu().numpy()
        counts = [int(marks[each.row, max(each.tokens.start - 1, 0) : each.tokens.stop - 1].sum()) for each in samples]
        found = [output.log_probs.detach()[learnt]]
        names = [name for name in (ENTROPY, TOP_ENTROPY) if name in self.rule.needs]
        if ENTROPY in names:
            found.append(output.entropy.detach()[learnt])
        if self._top is not None:
            found.append(self._top.take().to(found[0]))
        log_probs, *others = torch.stack([at_least_float32(each) for each in found]).cpu().numpy()
        return TokenInputs(np.cumsum([0, *counts]), -log_probs, self._vocabulary, dict(zip(names, others, strict=True)))

"""The signals that take a further forward or a second model: each is an entry of `FURTHER`. And the union of all.

Knows what they are made of, not how a pass runs. In formulas, x is the prompt and y the response, learnt tokens y_t.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel
from trl import SFTConfig

from ..config import InputError, check_kind
from ..criteria.forwards import NOISE, jitter, mean_losses, response_alone
from ..criteria.text import without_prompt
from ..criteria.verdict import Question, verdict
from ..data.fingerprints import identity
from ..data.loading import Opened, check_model
from ..data.reference_model import Reference
from ..model.losses import unwrapped
from ..model.resonance import Resonance
from ..model.signals import ALL, SIGNALS, Signal, chosen_signals, names_in
from .further_passes import COUNTS, Forward, FurtherPass

Numbers = Mapping[str, Mapping[str, np.ndarray]]  # of each forward by name; of the scoring pass: MAIN
MAIN = "main"
FIRST = "loss_first"  # what the scoring pass measures besides, for a ratio of losses over the same tokens


# ---- the forwards


def _plain(model: PreTrainedModel, opened: Opened) -> Forward:
    return Forward("Losses of the reference", mean_losses)


def _alone(label: str, model: PreTrainedModel, opened: Opened) -> Forward:
    start = getattr(unwrapped(model).config, "bos_token_id", None)
    return Forward(label, mean_losses, lambda ids, labels: response_alone(ids, labels, start))


def _jitter(model: PreTrainedModel, opened: Opened) -> Forward:
    return Forward("Losses with perturbed embeddings", jitter)


def _verdict(model: PreTrainedModel, opened: Opened) -> Forward:
    question = _question(model, opened)

    def measure(model: Any, batch: Any, way: Any) -> dict[str, Any]:
        return {"verdict": verdict(model, batch, way, question.no, question.yes)}

    return Forward("Asking for verdicts", measure, question)


def _question(model: PreTrainedModel, opened: Opened) -> Question:
    ends = [opened.tokenizer.eos_token_id, getattr(unwrapped(model).config, "eos_token_id", None)]
    stops = {token for each in ends if each is not None for token in (each if isinstance(each, list) else [each])}
    return Question.of(opened.tokenizer, stops, opened.prepared.template if opened.prepared.rendered else None)


FORWARDS: dict[str, Callable[[PreTrainedModel, Opened], Forward]] = {
    "alone": partial(_alone, "Losses without prompts"),
    "verdict": _verdict,
    "jitter": _jitter,
    "reference": _plain,
    "reference_alone": partial(_alone, "Losses of the reference without prompts"),
}
BY_REFERENCE = ("reference", "reference_alone")


# ---- the signals


@dataclass(frozen=True)
class FurtherSignal:
    """A signal that is made of the numbers of further forwards.

    Attributes:
        what: its formula, source, unit and direction.
        forwards: the names of the forwards that it needs.
        of: a function from the numbers to a value for each row, (N,).
        of_prompt: whether it relates the response to its prompt: NaN for a row without one.
        parts: what the scoring pass measures besides, by its name in `model.signals.PARTS`.
        obstacle: a function from the model and the rows to the reason why it cannot be measured, or None.
    """

    what: Signal
    forwards: tuple[str, ...]
    of: Callable[[Numbers], np.ndarray]
    of_prompt: bool = False
    parts: tuple[str, ...] = ()
    obstacle: Callable[[PreTrainedModel, Opened], str | None] = lambda model, opened: None

    @property
    def by_reference(self) -> bool:
        """Whether it needs a reference model."""
        return bool({*self.forwards} & {*BY_REFERENCE})


def _no_prompt(model: PreTrainedModel, opened: Opened) -> str | None:
    if not without_prompt(opened.prepared, opened.tokenizer.bos_token_id).all():
        return None
    return (
        "it relates a response to its prompt, and every token of all rows is learnt (prompt and completion have one, "
        "and messages with assistant_only_loss=True)"
    )


def _no_verdict(model: PreTrainedModel, opened: Opened) -> str | None:
    try:
        question = _question(model, opened)
    except InputError as error:
        return str(error)
    limit = getattr(unwrapped(model).config, "max_position_embeddings", None)
    longest = int(opened.prepared.lengths.max()) + len(question.tail) + 1
    if limit is None or longest <= limit:
        return None
    return f"with its question, a row has up to {longest} tokens and the model {limit} positions (lower max_length)"


def _ratio(given: Mapping[str, np.ndarray], alone: Mapping[str, np.ndarray]) -> np.ndarray:
    """The loss with the prompt divided by that without, over the tokens of both; 1 where there are none."""
    count = alone[COUNTS]
    if not count.any():
        return np.ones(len(count))
    left_out = np.where(count == given[COUNTS], 0, given["first"])
    with_prompt = (given["loss"] * given[COUNTS] - left_out) / np.maximum(count, 1)
    with np.errstate(over="ignore"):
        return np.where(count > 0, with_prompt / np.maximum(alone["loss"], np.finfo(np.float64).tiny), 1.0)


FURTHER: dict[str, FurtherSignal] = {
    "ifd": FurtherSignal(
        Signal(
            "mean_t -ln p(y_t | x, y_<t) / mean_t -ln p(y_t | y_<t), over the t that both predict",
            "IFD, arXiv 2308.12032, of which authors also drop values of 1 and more",
            "ratio of losses",
            "smallest",
        ),
        ("alone",),
        lambda numbers: _ratio(numbers[MAIN], numbers["alone"]),
        of_prompt=True,
        parts=(FIRST,),
        obstacle=_no_prompt,
    ),
    "verdict": FurtherSignal(
        Signal("ln P(No) - ln P(Yes) after the row and a question whether it is right", "arXiv 2603.06604"),
        ("verdict",),
        lambda numbers: numbers["verdict"]["verdict"],
        obstacle=_no_verdict,
    ),
    "loss_alone": FurtherSignal(
        Signal("mean_t -ln p(y_t | y_<t), without the prompt", "negative log-likelihood"),
        ("alone",),
        lambda numbers: numbers["alone"].get("loss", np.full(len(numbers["alone"][COUNTS]), np.nan)),
    ),
    "jitter": FurtherSignal(
        Signal(
            f"mean_t |ln p_t - ln p'_t|, p' with normal noise of {NOISE} of their root mean square on the embeddings",
            "after arXiv 2602.02427",
        ),
        ("jitter",),
        lambda numbers: numbers["jitter"]["jitter"],
    ),
    "excess": FurtherSignal(
        Signal(
            "mean_t -ln p_t - mean_t -ln q_t, q under the reference model",
            "excess loss, after RHO-Loss, arXiv 2206.07137, and Token Cleaning, arXiv 2502.01968",
            drop="smallest",
        ),
        ("reference",),
        lambda numbers: numbers[MAIN]["loss"] - numbers["reference"]["loss"],
    ),
    "superfiltering": FurtherSignal(
        Signal(
            "mean_t -ln q(y_t | x, y_<t) / mean_t -ln q(y_t | y_<t), q under the reference model",
            "Superfiltering, arXiv 2402.00530, as a ratio of losses",
            "ratio of losses",
            "smallest",
        ),
        ("reference", "reference_alone"),
        lambda numbers: _ratio(numbers["reference"], numbers["reference_alone"]),
        of_prompt=True,
        obstacle=_no_prompt,
    ),
}
ALL_SIGNALS: dict[str, Signal] = SIGNALS | {name: each.what for name, each in FURTHER.items()}


def of_one_pass(asked: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of signals, each of which the scoring pass alone can measure, as for `chosen_signals`.

    Raises:
        InputError: a name is not known, or is that of a signal with a further forward.
    """
    named = None if asked is None else [name for name in names_in(asked) if name != ALL]
    for name in chosen_signals(named, ALL_SIGNALS):
        if name in FURTHER:
            raise InputError(
                f"{name} takes a forward of its own, and a stream is read once: leave it out of signals=, or save the "
                "stream's rows and score them with score_dataset."
            )
    return chosen_signals(asked)


@dataclass(frozen=True)
class Wanted:
    """The signals of a pass, before its rows are known.

    Attributes:
        names: the signals that were asked for, in the order of `ALL_SIGNALS`.
        named: those among them that were asked for by name, and not by `"all"`.
        reference: the reference model.
    """

    names: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    reference: Reference | None = None

    @classmethod
    def of(cls, asked: str | Iterable[str] | None, reference: str | None, args: SFTConfig, sharded: bool) -> Wanted:
        """What `score_dataset` is asked for.

        Raises:
            InputError: a signal is not known, a reference is missing, not found or not needed, or it is an adapter
                and the model is to be sharded.
        """
        wanted = cls.without_reference(asked, reference)
        if reference is None:
            return wanted
        found = Reference.find(reference, args)
        if sharded and found.is_adapter:
            raise InputError(
                f"The reference '{reference}' is an adapter, which a sharded model cannot carry: pass a whole model, "
                "or leave sharded out."
            )
        return dataclasses.replace(wanted, reference=found)

    @classmethod
    def without_reference(cls, asked: str | Iterable[str] | None, reference: str | None) -> Wanted:
        """What is asked for, before the reference is looked for. Raises InputError as `of` does, but for that."""
        check_kind("reference", reference, (str, type(None)), "the name or folder of a model, as text")
        given = [] if asked is None else names_in(asked)
        names = chosen_signals(given, ALL_SIGNALS)
        named = chosen_signals([name for name in given if name != ALL], ALL_SIGNALS)
        needing = [name for name in names if name in FURTHER and FURTHER[name].by_reference]
        for name in needing:
            if reference is None and name in named:
                raise InputError(f"{name} needs a second model: pass reference=, the folder or name of one.")
        if reference is not None and not needing:
            known = [name for name, each in FURTHER.items() if each.by_reference]
            raise InputError(f"reference= is for the signals {' and '.join(known)}: ask for one with signals=.")
        return cls(names, named)

    def check_warmup(self) -> None:
        """Raise InputError where a warm-up tunes what the reference belongs to."""
        if self.reference is not None and self.reference.is_adapter:
            raise InputError(
                f"The reference '{self.reference.name}' is an adapter on the model as it is, not on its tuned copy: "
                "pass a whole model as the reference, or leave the warm-up out."
            )

    def settled(self, model: PreTrainedModel, opened: Opened) -> Opened:
        """The opened pass with the signals that can be measured, and the reference model, in its provenance.

        The reference is loaded for its hash, and again after the model's own forwards.

        Raises:
            InputError: a signal that was asked for by name cannot be measured, or the reference has another vocabulary.
        """
        names = self._possible(model, opened)
        if not names:
            return opened
        provenance = opened.provenance
        config, source = {**provenance.config, "signals": names}, dict(provenance.source)
        if self.reference is not None and any(name in FURTHER and FURTHER[name].by_reference for name in names):
            self.reference.check_vocabulary(model, opened.tokenizer)
            with self.reference.loaded(model) as other:
                check_model(other, opened.prepared)
                config |= identity(other)
            source["reference"] = self.reference.name
        if any(name in FURTHER and FURTHER[name].of_prompt for name in names):
            _warn_of_rows_without_prompt(opened)
        return dataclasses.replace(opened, provenance=dataclasses.replace(provenance, config=config, source=source))

    def _possible(self, model: PreTrainedModel, opened: Opened) -> list[str]:
        """The names of the signals that can be measured; prints which of all the others are left out, and why."""
        obstacles = {}
        for name in self.names:
            if name not in FURTHER:
                continue
            found = FURTHER[name].obstacle(model, opened)
            if FURTHER[name].by_reference and self.reference is None:
                found = "no reference model is given"
            if found is not None and name in self.named:
                raise InputError(f"{name} cannot be measured: {found}. Leave {name} out of the signals.")
            if found is not None:
                obstacles[name] = found
        if obstacles and PartialState().is_main_process:
            alike = {why: [name for name in obstacles if obstacles[name] == why] for why in obstacles.values()}
            told = "; ".join(f"{', '.join(names)} ({why})" for why, names in alike.items())
            print(f"Left out of all signals: {told}.")
        return [name for name in self.names if name not in obstacles]


def _warn_of_rows_without_prompt(opened: Opened) -> None:
    none = without_prompt(opened.prepared, opened.tokenizer.bos_token_id)
    if none.any() and PartialState().is_main_process:
        warnings.warn(
            f"{none.sum()} of {len(none)} rows have no prompt, as all their tokens are learnt: they have no IFD (NaN).",
            stacklevel=6,
        )


def measured_in_the_pass(names: Iterable[str]) -> tuple[str, ...]:
    """What the scoring pass measures of these signals, and for them, as names for a `Recorder`."""
    parts = [part for name in names if name in FURTHER for part in FURTHER[name].parts]
    return tuple(dict.fromkeys([*(name for name in names if name in SIGNALS), *parts]))


class _Clock:
    """The seconds of each forward, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, run: FurtherPass, model: PreTrainedModel, forward: Forward) -> dict[str, np.ndarray]:
        """What a forward measures."""
        begun = time.perf_counter()
        found = run.measure(model, name, forward)
        self.seconds[name] = time.perf_counter() - begun
        return found


def measure_further(
    names: Iterable[str],
    model: PreTrainedModel,
    opened: Opened,
    found: Resonance,
    run: FurtherPass,
    reference: Reference | None = None,
    seconds: dict[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """The signals among `names` that the scoring pass has not measured, (N,) each; each forward runs once.

    Args:
        names: the names of signals.
        model: the scored model, on its device.
        opened: its tokenizer and rows.
        found: what the scoring pass has measured.
        run: how the forwards run.
        reference: the reference model, if a signal needs one; it is loaded after the model's own forwards.
        seconds: a mapping to extend with the seconds that each signal's forwards took; signals may share them.

    Raises:
        InputError: a number is not finite, or the reference cannot be loaded.
    """
    wanted = {name: FURTHER[name] for name in names if name in FURTHER}
    needed = {forward for each in wanted.values() for forward in each.forwards}
    forwards = {name: make(model, opened) for name, make in FORWARDS.items() if name in needed}
    main = {"loss": found.loss, COUNTS: found.num_tokens}
    numbers = {MAIN: main | ({"first": found.signals[FIRST]} if FIRST in found.signals else {})}
    clock = _Clock()
    numbers |= {
        name: clock.timed(name, run, model, each) for name, each in forwards.items() if name not in BY_REFERENCE
    }
    by_reference = {name: each for name, each in forwards.items() if name in BY_REFERENCE}
    if by_reference and reference is not None:
        with reference.loaded(model) as other:
            numbers |= {name: clock.timed(name, run, other, each) for name, each in by_reference.items()}
    if seconds is not None:
        seconds |= {name: sum(clock.seconds[each] for each in signal.forwards) for name, signal in wanted.items()}
    signals = {name: each.of(numbers) for name, each in wanted.items()}
    if any(each.of_prompt for each in wanted.values()):
        none = without_prompt(opened.prepared, opened.tokenizer.bos_token_id)
        signals |= {name: np.where(none, np.nan, signals[name]) for name, each in wanted.items() if each.of_prompt}
    return signals

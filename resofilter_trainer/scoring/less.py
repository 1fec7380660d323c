"""LESS: rows whose gradient, as Adam would apply it, points where the validation rows' gradients point.

    LoRA warm-up on some rows, several epochs; at the end of each:
        z' of the validation rows   g, plain                                                              (M, d)
        z  of the training rows     m' / sqrt(v' + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2  (N, d)
        score(z) += learning rate * mean over z' of cos(R g(z'), R a(z)),  R a random projection to d

(Xia et al., arXiv 2402.04333, sections 3 and 4; as in the released code eps stands inside the root, and Adam's moments
are not corrected for their start. The paper takes the largest score over several validation tasks; here there is one.)
Knows training by TRL, nothing of files.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from ..config import InputError
from ..data.preparation import PreparedRows
from ..model.losses import token_losses
from ..model.modes import evaluating
from .batches import collate

MOMENTS = ("exp_avg", "exp_avg_sq")
PROJECTED = 8  # gradients that are projected together, or as many as fit into
GRADIENTS = 1 << 28  # numbers: a gigabyte of float32
CHUNK = 1 << 13  # rows of the projection that are held at once


@dataclass(frozen=True)
class LessConfig:
    """How LESS warms up and projects. The defaults are the paper's, but for the adapters, which are on all linear maps.

    Attributes:
        share: of the rows that the warm-up trains on.
        epochs: of the warm-up, after each of which gradients are taken.
        learning_rate: of the warm-up.
        lora_r: rank of the adapters.
        dimensions: of the projection.
        seed: of the rows of the warm-up and of the projection.
    """

    share: float = 0.05
    epochs: int = 4
    learning_rate: float = 2e-5
    lora_r: int = 128
    dimensions: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("share", numbers.Real), ("learning_rate", numbers.Real), ("seed", numbers.Integral)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
                raise InputError(f"LESS's {name} is a number of at least 0, got {value!r}.")
        if not 0 < self.share <= 1:
            raise InputError(f"share of the rows that LESS warms up on is above 0 and at most 1, got {self.share}.")
        for name in ("epochs", "lora_r", "dimensions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(f"LESS's {name} is a whole number of at least 1, got {value!r}.")


def less_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: PreparedRows,
    validation: PreparedRows,
    args: SFTConfig,
    config: LessConfig,
) -> np.ndarray:
    """The influence of every row on the validation rows' loss, (N,); large is good.

    Args:
        model: gets an adapter, which is trained; the weights below it stay.
        tokenizer: its.
        rows, validation: as tokens.
        args: SFTTrainer's, for all that `config` does not say.
        config: see `LessConfig`.
    """
    if len(validation.lengths) == 0:
        raise InputError("LESS needs a validation set: rows like those that the model is to be good at.")
    count = max(int(config.share * len(rows.lengths)), min(len(rows.lengths), args.per_device_train_batch_size))
    some = np.sort(np.random.default_rng(config.seed).choice(len(rows.lengths), count, replace=False))
    watch = _AtEpochEnds(rows, validation, config)
    trainer = SFTTrainer(
        model,
        _warm_up_arguments(args, config),
        train_dataset=rows.select(some).dataset.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora_r, lora_alpha=4 * config.lora_r, lora_dropout=0.1, target_modules="all-linear"
        ),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    return watch.scores


def _warm_up_arguments(args: SFTConfig, config: LessConfig) -> SFTConfig:
    args = copy.copy(args)
    args.num_train_epochs, args.max_steps, args.learning_rate = config.epochs, -1, config.learning_rate
    args.lr_scheduler_type, args.lr_scheduler_kwargs, args.warmup_steps = "linear", None, 0.03
    args.save_strategy, args.eval_strategy, args.seed = "no", "no", config.seed
    args.load_best_model_at_end, args.model_init_kwargs = False, None
    args.assistant_only_loss = False  # the labels say it
    return args


def projection_flops(model: PreTrainedModel, rows: int, config: LessConfig) -> float:
    """Of projecting every row's gradient after every epoch, `2 P d` each; the few validation rows' are left out."""
    maps = [each for each in model.modules() if isinstance(each, nn.Linear | Conv1D)]
    size = config.lora_r * sum(sum(each.weight.shape) for each in maps if each is not model.get_output_embeddings())
    return 2.0 * config.epochs * rows * size * config.dimensions if size > config.dimensions else 0.0


class _AtEpochEnds(TrainerCallback):
    """Adds up the influence at the end of every epoch of the warm-up."""

    def __init__(self, rows: PreparedRows, validation: PreparedRows, config: LessConfig) -> None:
        self.rows, self.validation, self.config = rows, validation, config
        self.scores = np.zeros(len(rows.lengths))
        self.trainer: Any = None
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate, self.rates = float(np.mean(self.rates)), []
        model, optimizer = kwargs["model"], self.trainer.optimizer
        weights = [each for each in model.parameters() if each.requires_grad]
        if not all(optimizer.state[each].keys() >= set(MOMENTS) for each in weights):
            raise InputError("LESS applies Adam's own moments: leave optim as it is, or use another Adam.")
        m, v = (torch.cat([optimizer.state[each][name].flatten() for each in weights]) for name in MOMENTS)
        group = optimizer.param_groups[0]
        applied = partial(preconditioned, m=m, v=v, betas=group["betas"], eps=group["eps"])
        parts = _directions(model, weights, self.validation, lambda g: g, self.config)
        good = torch.cat(list(parts)).mean(0)  # the mean of the cosines is that with the mean direction
        own = _directions(model, weights, self.rows, applied, self.config)
        self.scores += rate * torch.cat([each @ good for each in own]).double().cpu().numpy()


def preconditioned(g: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Where Adam's next step would go, `m' / sqrt(v' + eps)`, given its moments before it; all (P,)."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.square()
    return m / (v + eps).sqrt()


def _directions(
    model: nn.Module,
    weights: list[nn.Parameter],
    rows: PreparedRows,
    apply: Callable[[Tensor], Tensor],
    config: LessConfig,
) -> Iterator[Tensor]:
    """Each row's gradient, as it is applied, projected, of length 1: some (n, d) at a time."""
    with evaluating(model):
        size = sum(each.numel() for each in weights)
        together = max(PROJECTED, GRADIENTS // size)  # the signs are drawn anew for each block
        for places in np.array_split(np.arange(len(rows.lengths)), -(-len(rows.lengths) // together)):
            block = torch.empty(len(places), size, device=weights[0].device)
            for place, row in enumerate(places):
                block[place] = apply(_gradient(model, weights, collate(rows, [row], weights[0].device)))
            yield F.normalize(project(block, config.dimensions, config.seed), dim=1)


def _gradient(model: nn.Module, weights: list[nn.Parameter], batch: dict[str, Tensor]) -> Tensor:
    """Of the mean loss of a batch of one sample, flat, (P,) float32."""
    with torch.enable_grad():
        found = torch.autograd.grad(token_losses(model, batch).mean(), weights, materialize_grads=True)
    return torch.cat([each.flatten() for each in found]).float()


def project(features: Tensor, dimensions: int, seed: int) -> Tensor:
    """Random signs times (N, P) features, (N, d) (Johnson and Lindenstrauss); as they are where P is no more than d."""
    if features.shape[1] <= dimensions:
        return features
    generator = torch.Generator(features.device).manual_seed(seed)
    projected = features.new_zeros(len(features), dimensions)
    for part in features.split(CHUNK, dim=1):
        shape = (part.shape[1], dimensions)
        signs = torch.randint(0, 2, shape, generator=generator, device=features.device, dtype=torch.int8)
        projected += part @ (2.0 * signs - 1)
    return projected / dimensions**0.5

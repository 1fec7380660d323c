"""LESS: scores rows by how well their gradient, as Adam applies it, agrees with the validation rows' gradients.

    LoRA warm-up on some rows, several epochs; at the end of each:
        z' of the validation rows   g, plain                                                              (M, d)
        z  of the training rows     m' / sqrt(v' + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2  (N, d)
        score(z) += learning rate * mean over z' of cos(R g(z'), R a(z)),  R a random projection to d

Xia et al., arXiv 2402.04333, sections 3 and 4. As in the released code, eps is inside the root and Adam's moments have
no bias correction. The paper takes the largest score over several validation tasks; here there is one task.
Knows training by TRL, not files.
"""

from __future__ import annotations

import copy
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

from ..config import InputError, number, whole_number
from ..config.compatibility import set_warmup
from ..data.preparation import PreparedRows
from ..model.losses import token_losses
from ..model.modes import evaluating
from .batches import collate

MOMENTS = ("exp_avg", "exp_avg_sq")
PROJECTED = 8  # gradients to project together at least; more if they fit into
GRADIENTS = 1 << 28  # numbers: a gigabyte of float32
CHUNK = 1 << 13  # rows of the projection in memory at once


@dataclass(frozen=True)
class LessConfig:
    """How LESS warms up and projects. The defaults are the paper's, except that all linear maps have adapters.

    Attributes:
        share: the share of the rows that the warm-up trains on.
        epochs: the epochs of the warm-up; gradients are taken after each.
        learning_rate: the learning rate of the warm-up.
        lora_r: the rank of the adapters.
        dimensions: the dimensions of the projection.
        seed: the seed of the warm-up's rows and of the projection.
    """

    share: float = 0.05
    epochs: int = 4
    learning_rate: float = 2e-5
    lora_r: int = 128
    dimensions: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        number("LESS's share of the rows to warm up on", self.share, above=0, most=1)
        number("LESS's learning_rate", self.learning_rate, least=0)
        for name, least in (("epochs", 1), ("lora_r", 1), ("dimensions", 1), ("seed", 0)):
            whole_number(f"LESS's {name}", getattr(self, name), least)


def less_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: PreparedRows,
    validation: PreparedRows,
    args: SFTConfig,
    config: LessConfig,
) -> np.ndarray:
    """The influence of every row on the validation rows' loss, (N,); larger is better.

    Args:
        model: the model; it gets an adapter, which is trained, and its own weights stay as they are.
        tokenizer: the model's tokenizer.
        rows, validation: the rows to score and the validation rows, as tokens.
        args: SFTTrainer's arguments for everything that `config` does not set.
        config: see `LessConfig`.

    Raises:
        InputError: there are no validation rows, or the optimizer is not an Adam.
    """
    if len(validation.lengths) == 0:
        raise InputError("LESS needs a validation set: rows like those that the model should do well on.")
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
    args.lr_scheduler_type, args.lr_scheduler_kwargs = "linear", None
    set_warmup(args, 0.03)
    args.save_strategy, args.eval_strategy, args.seed = "no", "no", config.seed
    args.load_best_model_at_end, args.model_init_kwargs = False, None
    args.assistant_only_loss = False  # the labels already do that
    return args


def projection_flops(model: PreTrainedModel, rows: int, config: LessConfig) -> float:
    """The FLOPs of projecting every row's gradient after every epoch, `2 P d` each, without the few validation rows."""
    maps = [each for each in model.modules() if isinstance(each, nn.Linear | Conv1D)]
    size = config.lora_r * sum(sum(each.weight.shape) for each in maps if each is not model.get_output_embeddings())
    return 2.0 * config.epochs * rows * size * config.dimensions if size > config.dimensions else 0.0


class _AtEpochEnds(TrainerCallback):
    """Sums up the influence at the end of every epoch of the warm-up."""

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
            raise InputError("LESS needs Adam's own moments: leave optim at its default, or use another Adam.")
        m, v = (torch.cat([optimizer.state[each][name].flatten() for each in weights]) for name in MOMENTS)
        group = optimizer.param_groups[0]
        applied = partial(preconditioned, m=m, v=v, betas=group["betas"], eps=group["eps"])
        directions = _directions(model, weights, self.validation, lambda g: g, self.config)
        good = torch.cat(list(directions)).mean(0)  # the mean of the cosines is the product with the mean direction
        own = _directions(model, weights, self.rows, applied, self.config)
        self.scores += rate * torch.cat([each @ good for each in own]).double().cpu().numpy()


def preconditioned(g: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """The direction of Adam's next step, `m' / sqrt(v' + eps)`, from the moments before it; all (P,)."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.square()
    return m / (v + eps).sqrt()


def _directions(
    model: nn.Module,
    weights: list[nn.Parameter],
    rows: PreparedRows,
    apply: Callable[[Tensor], Tensor],
    config: LessConfig,
) -> Iterator[Tensor]:
    """Each row's gradient, as `apply` gives it, projected and normalised to length 1; (n, d) for n rows at a time."""
    with evaluating(model):
        size = sum(each.numel() for each in weights)
        together = max(PROJECTED, GRADIENTS // size)  # the signs are drawn again for each block
        for places in np.array_split(np.arange(len(rows.lengths)), -(-len(rows.lengths) // together)):
            block = torch.empty(len(places), size, device=weights[0].device)
            for place, row in enumerate(places):
                block[place] = apply(_gradient(model, weights, collate(rows, [row], weights[0].device)))
            yield F.normalize(project(block, config.dimensions, config.seed), dim=1)


def _gradient(model: nn.Module, weights: list[nn.Parameter], batch: dict[str, Tensor]) -> Tensor:
    """The gradient of the mean loss of a batch of one sample, flat, (P,) float32."""
    with torch.enable_grad():
        found = torch.autograd.grad(token_losses(model, batch).mean(), weights, materialize_grads=True)
    return torch.cat([each.flatten() for each in found]).float()


def project(features: Tensor, dimensions: int, seed: int) -> Tensor:
    """(N, P) features times random signs, (N, d) (Johnson and Lindenstrauss); unchanged if P is at most d."""
    if features.shape[1] <= dimensions:
        return features
    generator = torch.Generator(features.device).manual_seed(seed)
    projected = features.new_zeros(len(features), dimensions)
    for chunk in features.split(CHUNK, dim=1):
        shape = (chunk.shape[1], dimensions)
        signs = torch.randint(0, 2, shape, generator=generator, device=features.device, dtype=torch.int8)
        projected += chunk @ (2.0 * signs - 1)
    return projected / dimensions**0.5

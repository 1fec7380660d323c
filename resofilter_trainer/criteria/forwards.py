"""What a further forward over a batch measures for a signal. Knows models and batches, no dataset and no file.

Each is a function `(model, batch, way)` to numbers of shape (B,), float64, by name. A batch has `input_ids`,
`attention_mask` and `labels`, each (B, T), padded on either side; `way` is how far the model runs before the
vocabulary's tiles are computed (`model.head.find_way`), so all logits are never in memory at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError
from ..model.head import Way
from ..model.losses import IGNORE, TokenBatch, inputs_of, learnt_positions, sample_means, unwrapped
from ..model.modes import at_least_float32

NOISE = 0.1  # the standard deviation of jitter's noise, as a share of each embedding's own root mean square
SEED = 0  # of jitter's noise


@torch.no_grad()
def mean_losses(model: nn.Module, batch: TokenBatch, way: Way) -> dict[str, Tensor]:
    """`loss`, the mean of `-ln p` over a sample's learnt tokens, and `first`, that of the first of them."""
    losses = way(model, inputs_of(model, batch, causal=False)).losses().double()
    learnt = learnt_positions(batch["labels"]).to(losses.device)
    counts = learnt.sum(1)
    return {"loss": sample_means(losses, learnt), "first": F.pad(losses, (0, 1))[counts.cumsum(0) - counts]}


@torch.no_grad()
def jitter(model: nn.Module, batch: TokenBatch, way: Way) -> dict[str, Tensor]:
    """How far the probabilities of the learnt tokens move when the embeddings of the tokens before them do.

        mean_t |ln p_t - ln p'_t|,    p' with each embedding e_s replaced by e_s + 0.1 rms(e_s) z_s

    The noise z_s, standard normal, (H,), depends on the token's place s in its row alone. Both forwards are of the same
    batch, so that the rounding of a low precision is the same in both. After arXiv 2602.02427, which measures such a
    sensitivity at the steps of a reasoning.

    Raises:
        InputError: the model does not embed the tokens of a row one by one.
    """
    inputs = inputs_of(model, batch, causal=False)
    losses = way(model, inputs).losses()
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with perturbed_embeddings(model, places):
        moved = way(model, inputs)
    change = (moved.losses() - losses).abs().double()
    return {"jitter": sample_means(change, learnt_positions(batch["labels"]).to(change.device))}


@contextlib.contextmanager
def perturbed_embeddings(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Adds noise to the embeddings of a batch's tokens, see `jitter`; `places` (B, T) are the tokens' places."""
    calls: list[torch.Size] = []

    def add_noise(module: nn.Module, args: object, output: Tensor) -> Tensor:
        calls.append(output.shape[:-1])
        if output.shape[:-1] != places.shape:
            return output
        noise = np.random.default_rng(SEED).standard_normal((int(places.max()) + 1, output.shape[-1]))
        size = NOISE * at_least_float32(output).square().mean(-1, keepdim=True).sqrt()
        z = torch.from_numpy(noise).to(size)[places.to(output.device)]
        return output + (size * z).to(output.dtype)

    handle = unwrapped(model).get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
    if calls != [places.shape]:
        raise InputError(
            "jitter perturbs the embeddings of a row's tokens, and this model does not embed them one by one: leave "
            "jitter out of the signals."
        )


def response_alone(ids: list[int], labels: list[int], start: int | None) -> tuple[list[int], list[int]]:
    """A row from its first learnt token to its last, as tokens and labels, without its prompt.

    Nothing predicts its first token, which is not learnt then, unless the row begins with the start token, which stays
    before it.
    """
    begins = bool(ids) and ids[0] == start
    learnt = [place for place, label in enumerate(labels) if label != IGNORE and (place > 0 or not begins)]
    own = slice(learnt[0], learnt[-1] + 1)
    before = ids[:1] if begins else []
    return before + ids[own], [IGNORE, *labels[own]] if begins else [IGNORE, *labels[own][1:]]

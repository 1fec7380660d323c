"""What other selectors measure of a sample: one function per criterion, `(model, batch) -> one number per sample`.

    from one forward     loss, perplexity, entropy, el2n, norms (DONOD), embedding
    from two forwards    ifd
    from a backward      grand
    without a model      see `text.py`

A batch has `input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right. A model is a transformers
model without dropout. Plain implementations, in float32 or better. How the numbers become a score, and which end of it
to drop, is in `criterion.py`. Knows nothing of datasets or files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import InputError
from ..model.losses import (
    IGNORE,
    TokenBatch,
    inputs_of,
    learnt_logits,
    learnt_positions,
    sample_means,
    token_losses,
    unwrapped,
)
from ..model.modes import at_least_float32, requiring_grad

LR = 1e-5  # learning rate of DONOD's step; ranks hardly depend on it


def loss(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean negative log-likelihood of the learnt tokens, (B,) in nats."""
    with torch.no_grad():
        return sample_means(token_losses(model, batch), learnt_positions(batch["labels"]))


def perplexity(model: nn.Module, batch: TokenBatch) -> Tensor:
    """`e^loss`, (B,); ranks rows as the loss does."""
    return loss(model, batch).exp()


@torch.no_grad()
def entropy(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean entropy of the predictions at the learnt tokens, `-sum p log p`, (B,) in nats."""
    log_p = _log_probabilities(model, batch)
    return sample_means(-(log_p.exp() * log_p).sum(-1), learnt_positions(batch["labels"]))


@torch.no_grad()
def el2n(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean norm of the error `p - y`, with y one-hot, (B,) (EL2N: Paul et al., arXiv 2107.07075, definition 2.3).

    At the given weights; the paper averages it over early weights of several runs.
    """
    log_p, targets = _log_probabilities(model, batch), inputs_of(model, batch, causal=False).targets
    return sample_means(_error(log_p, targets).norm(dim=-1), learnt_positions(batch["labels"]))


@torch.no_grad()
def ifd(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Instruction-following difficulty, (B,): `loss(response | prompt) / loss(response alone)` (arXiv 2308.12032).

    The ratio of perplexities ranks similarly, but not equally. The response is everything from the first learnt token
    to the last. Alone, nothing predicts its first token, unless the row begins with the model's beginning-of-sequence
    token, which then stays before it. Both losses are over the same tokens. For a response of one token without a
    beginning-of-sequence token the result is 1.
    """
    alone, begins = _responses(model, batch)
    counted = alone["labels"][:, 1:] != IGNORE  # the tokens of both losses
    row_of = learnt_positions(batch["labels"]).nonzero()[:, 0]
    is_first = torch.cat([row_of.new_ones(1, dtype=torch.bool), row_of[1:] != row_of[:-1]])
    with_prompt = token_losses(model, batch)[~is_first | begins[row_of]]
    given, without = (sample_means(losses, counted) for losses in (with_prompt, token_losses(model, alone)))
    return torch.where(counted.any(1), given / without.clamp(min=torch.finfo(without.dtype).tiny), 1.0)


def grand(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Norm of the gradient of each sample's own loss, over all trainable weights, (B,) (GraNd, arXiv 2107.07075).

    The norm of definition 2.1 at the given weights; the paper averages it over early weights of several runs. Takes one
    backward per sample.
    """
    weights = [each for each in model.parameters() if each.requires_grad]
    if not weights:
        raise InputError("The gradient's norm is over trainable weights, and all are frozen.")
    found = []
    for row in range(len(batch["input_ids"])):
        own = {name: tensor[row : row + 1, : int(batch["attention_mask"][row].sum())] for name, tensor in batch.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(token_losses(model, own).mean(), weights, allow_unused=True)
        squares = [each.double().square().sum() for each in gradients if each is not None]
        found.append(torch.stack(squares).sum().sqrt())
    return torch.stack(found)


def norms(model: nn.Module, batch: TokenBatch) -> Tensor:
    """DONOD's two norms of one gradient step on the output layer's W for each sample, (B, 2) (arXiv 2504.14810).

        delta of norm   ||W - lr G|| - ||W||
        norm of delta   lr ||G||

    G is the gradient of the sample's mean loss: the mean over its tokens of `e_t h_t^T`, with `e_t` the gradient at the
    layer's output. It is never computed: `||G||^2` is the mean of `(e_s . e_t)(h_s . h_t)` over all pairs of positions,
    and `<W, G>` the mean of `e_t . W h_t`. In both norms, small is good.

    Raises:
        InputError: the model's head is not one linear map.
    """
    head = unwrapped(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError(f"DONOD needs an output layer that is a linear map; this model has {type(head).__name__}.")
    hidden, output, error = _at_the_head(model, head, batch)
    along = (error * (output if head.bias is None else output - head.bias.detach())).sum(-1)
    counts = learnt_positions(batch["labels"]).sum(1).tolist()
    norm = head.weight.detach().double().norm()
    found = []
    for e, h, a in zip(error.split(counts), hidden.split(counts), along.split(counts), strict=True):
        squared = ((e @ e.T) * (h @ h.T)).mean().clamp(min=0)
        after = (norm**2 - 2 * LR * a.mean() + LR**2 * squared).clamp(min=0).sqrt()
        found.append(torch.stack([after - norm, LR * squared.sqrt()]))
    return torch.stack(found)


@torch.no_grad()
def embedding(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The mean of the last hidden states over a sample's tokens, (B, H), for k-center and diversity."""
    mask = batch["attention_mask"]
    output = model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True, use_cache=False)
    last = at_least_float32(output.hidden_states[-1])
    return (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def farthest_first(features: np.ndarray) -> np.ndarray:
    """The order in which k-center takes rows, (N, d) to (N,), from 0 (arXiv 1708.00489, algorithm 1).

    The first row is the nearest to the mean; each further row is the farthest from all before it. Takes N^2 distances.
    """
    order = np.empty(len(features))
    next_row = int(np.linalg.norm(features - features.mean(0), axis=1).argmin())
    nearest = np.full(len(features), np.inf)
    for place in range(len(features)):
        order[next_row] = place
        nearest = np.minimum(nearest, np.linalg.norm(features - features[next_row], axis=1))
        nearest[next_row] = -1  # never taken again
        next_row = int(nearest.argmax())
    return order


def below_one(ratio: np.ndarray) -> np.ndarray:
    """IFD, or 0 for a ratio of 1 or more: rows whose prompt is no help are dropped first; (N, 1) to (N,)."""
    return np.where(ratio[:, 0] < 1, ratio[:, 0], 0.0)


def _log_probabilities(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(N, V), at the learnt positions."""
    return at_least_float32(learnt_logits(model, inputs_of(model, batch, causal=False))).log_softmax(-1)


def _error(log_p: Tensor, targets: Tensor) -> Tensor:
    """(N, V) `p - y`."""
    return log_p.exp() - F.one_hot(targets, log_p.shape[-1])


def _at_the_head(model: nn.Module, head: nn.Linear, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """At the learnt positions the head's input, (N, H), its output and each loss's gradient there, both (N, V).

    All in float64. The gradient includes what the model does with the head's output, such as a cap or a scale.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((args[0].detach(), output.detach().requires_grad_()))
        return seen[-1]

    handle = head.register_forward_hook(cut)
    try:
        with torch.enable_grad(), requiring_grad(model.parameters(), False):  # the graph begins at the head
            losses = token_losses(model, batch)
    finally:
        handle.remove()
    hidden, output = seen
    (error,) = torch.autograd.grad(losses.sum(), output)
    flat = [each.flatten(0, -2) for each in (hidden, output.detach(), error)]
    if len(flat[0]) != len(losses):  # the head ran on every position
        index = inputs_of(model, batch, causal=False).index
        flat = [each[index] for each in flat]
    return flat[0].double(), flat[1].double(), flat[2].double()


def _responses(model: nn.Module, batch: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
    """The rows from their first learnt token to their last, and whether each begins with a start token, (B,)."""
    start_token = unwrapped(model).config.bos_token_id
    begins = batch["input_ids"][:, 0] == (-1 if start_token is None else start_token)
    rows = []
    for ids, labels, begin in zip(batch["input_ids"], batch["labels"], begins, strict=True):
        learnt = (labels[1:] != IGNORE).nonzero()[:, 0] + 1
        ids, labels = ids[learnt[0] : learnt[-1] + 1], labels[learnt[0] : learnt[-1] + 1].clone()
        if begin:
            ids, labels = F.pad(ids, (1, 0), value=start_token), F.pad(labels, (1, 0), value=IGNORE)
        else:
            labels[0] = IGNORE  # nothing predicts it
        rows.append((ids, labels, torch.ones_like(ids)))
    names, fillers = ("input_ids", "labels", "attention_mask"), (0, IGNORE, 0)
    padded = [
        nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=filler)
        for tensors, filler in zip(zip(*rows, strict=True), fillers, strict=True)
    ]
    return dict(zip(names, padded, strict=True)), begins

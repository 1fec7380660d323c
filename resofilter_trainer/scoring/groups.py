"""Groups of processes, each of which holds a sharded model and takes batches from one queue. Knows no batch's content.

    queue of all batches -> a free group takes a chunk -> one batch in each process of the group, at the same time, ...

The processes of a group gather every layer together, so each must run the model equally often. Groups do not wait for
each other: a slow one takes fewer chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from ..config import InputError, ResonanceConfig, whole_number
from ..model.sharding import neighbours, of_first, shard
from .distribution import batches_alike, guided_chunks, rounds
from .team import LostError, Team


def check_group(size: int, sharded: bool, args: TrainingArguments) -> None:
    """Raise InputError for a number of processes that no group of a sharded model can have.

    Args:
        size: the number of processes of a group.
        sharded: whether the model is to be sharded.
        args: what starts the processes' communication.
    """
    whole_number("group_size", size, least=2)
    if not sharded:
        raise InputError("group_size is the number of processes that hold a sharded model: pass sharded=True, too.")
    _ = args.device  # which starts it, with the arguments' timeout
    if size > PartialState().num_processes:
        raise InputError(f"group_size is {size}, and there are {PartialState().num_processes} processes.")


def shard_in_groups(
    model: PreTrainedModel, config: ResonanceConfig, args: TrainingArguments, size: int | None
) -> PreTrainedModel:
    """The model, sharded over each group of processes.

    Args:
        model: as for `shard`, in the first process of a group and in its others.
        config: the layers to measure.
        args: the device, and after how many seconds a silent process of a group counts as lost.
        size: the number of processes of a group; by default all.
    """
    device = args.device
    group = None if size is None else neighbours(size, timedelta(seconds=args.ddp_timeout))
    shard(model, config, device, group)
    return model


def as_groups_are_free(
    todo: np.ndarray, costs: np.ndarray, team: Team, group: dist.ProcessGroup
) -> Iterator[tuple[int, int, bool]]:
    """Each batch that this process measures: how many were handed out before it, its number, and whether it counts.

    A batch that is measured again, so that every process of the group has one, does not count.

    Args:
        todo: (B,) the numbers of the batches.
        costs: (B,) their costs.
        team: the processes of the pass.
        group: those that hold the model together with this one.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sizes = gather_object([size])
    alike = batches_alike(costs, max(sizes))
    chunks = guided_chunks(np.array([costs[each].sum() for each in alike]), round(sum(1 / each for each in sizes)))
    while (taken := _taken(team, group)) < len(chunks):
        for number in range(chunks[taken].start, chunks[taken].stop):
            for places in rounds(costs[alike[number]], size):
                mine = places[rank]
                counts = not (places[:rank] == mine).any()
                yield number * max(sizes), int(todo[alike[number][mine]]), counts


def _taken(team: Team, group: dist.ProcessGroup) -> int:
    """The chunk that the first process of a group takes, in every process of it; or what it was refused with."""
    taken, lost = -1, None
    if dist.get_rank(group) == 0:
        try:
            taken = team.take()
        except LostError as error:
            lost = error
    taken, said = of_first(group, (taken, None if lost is None else str(lost)))
    if said is not None:
        raise lost or LostError(said)
    return taken

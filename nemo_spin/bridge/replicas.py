"""What replicas do with files: each a share of what all of them hold, instead of all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

from nemo_spin.bridge.placement import Placed


def own_share(parameters: Sequence[Placed]) -> list[Placed]:
    """Those of this rank's parameters that fall to it: each falls to one of its replicas."""
    return [
        placed
        for placed, owner in zip(parameters, _owners(parameters), strict=True)
        if placed.replicas is None or distributed.get_rank(placed.replicas) == owner
    ]


@torch.no_grad()
def hand_round(parameters: Sequence[Placed]) -> None:
    """Gives every replica the values of the one that a parameter falls to.

    All ranks must call: one broadcast for each parameter, in the group of its replicas.
    """
    for placed, owner in zip(parameters, _owners(parameters), strict=True):
        group = placed.replicas
        if group is not None and distributed.get_world_size(group) > 1:
            source = distributed.get_global_rank(group, owner)
            distributed.broadcast(placed.parameter.detach(), source, group=group)


def _owners(parameters: Sequence[Placed]) -> list[int]:
    """For each parameter a rank in the group of its replicas, the same on all of them.

    The largest first, each to the rank that has least so far.
    """
    owners = [0] * len(parameters)
    held: dict[int, list[int]] = {}  # of experts the replicas are others
    for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].parameter.numel()):
        group = parameters[index].replicas
        if group is not None:
            amounts = held.setdefault(id(group), [0] * distributed.get_world_size(group))
            owners[index] = amounts.index(min(amounts))
            amounts[owners[index]] += parameters[index].parameter.numel()
    return owners

"""Sharded tensors in plain types (ours; why: ``plain_checkpoint``).

Cause: with ``state_dict_cfg='local'``, its default, MMEngine's FSDPStrategy has every process save a file of its own,
whose weights are ``ShardedTensor`` objects. ``torch.load(weights_only=True)`` refuses them.

Repair: a dict of the process's pieces and the whole tensor's size is saved instead, and the object is made anew when
the file is loaded, by as many processes as saved it.

Ends with: a torch that allows ``ShardedTensor`` (none as of 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_sharded_tensor(value: Any) -> bool:
    """Whether ``value`` is a sharded tensor of all processes together (not of a part of them)."""
    if type(value).__name__ != 'ShardedTensor' or not dist.is_initialized():
        return False
    return dist.get_world_size(value._process_group) == dist.get_world_size()


def plain_shards(value: Any) -> dict[str, Any]:
    """This process's part of a ``ShardedTensor``: the pieces, where they begin, and how many processes there are."""
    # Not by its methods: each of them warns that torch is going to give up sharded tensors.
    shards = value._local_shards
    return {
        'size': list(value._metadata.size),
        'processes': dist.get_world_size(),
        # A piece shares its memory with the whole flat parameter, all of which would be written.
        'pieces': [shard.tensor.detach().clone() for shard in shards],
        'offsets': [list(shard.metadata.shard_offsets) for shard in shards],
    }


def rebuild_shards(value: dict[str, Any]) -> Any:
    """The inverse of ``plain_shards``; all processes must come here.

    Raises:
        ValueError: There are not as many processes as saved the tensor.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes != value['processes'] or not dist.is_initialized():
        raise ValueError(
            f'it was saved by {value["processes"]} processes under FSDP, each its own part, and is loaded by '
            f"{processes}: start as many, or save whole weights, by strategy=dict(state_dict_cfg='full')"
        )
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard

    pairs = zip(value['pieces'], value['offsets'], strict=True)
    shards = [Shard.from_tensor_and_offsets(piece, offsets, dist.get_rank()) for piece, offsets in pairs]
    return init_from_local_shards(shards, *torch.Size(value['size']))

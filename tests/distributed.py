"""Run a function in several processes joined by gloo, on the CPU."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# mm_sharp comes before what is MMEngine's: see mm_sharp.compat.yapf_grammar.
_IMPORTED = ['mm_sharp', 'mmengine.runner', 'torch.distributed.fsdp', 'tests.wrappers', 'tests.quantized_toys']


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port: int = listener.getsockname()[1]
        return port


def run(function: Callable[..., Any], processes: int, *args: Any) -> list[Any]:
    """``function(rank, processes, *args)`` in each of ``processes`` processes; what they returned, by rank.

    Args:
        function: Importable by name; what it returns must be picklable.
        processes: World size.
        args: Passed on.
    """
    # They are forked from a server that has imported what they need, which takes longer than what most of them do.
    mp.get_context('forkserver').set_forkserver_preload([*_IMPORTED, function.__module__])
    # Files and not a queue: a full pipe would block the workers, and the parent waits for them.
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, processes, free_port(), folder, args)
        mp.start_processes(_worker, arguments, nprocs=processes, join=True, start_method='forkserver')
        return [pickle.loads((Path(folder) / f'{rank}.pkl').read_bytes()) for rank in range(processes)]


def _worker(
    rank: int, function: Callable[..., Any], processes: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), LOCAL_RANK=str(rank), OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=processes)
    try:
        result = function(rank, processes, *args)
        (Path(folder) / f'{rank}.pkl').write_bytes(pickle.dumps(result))
    finally:
        gc.collect()  # DDP in a reference cycle holds the group, whose threads must end before the process does
        dist.destroy_process_group()

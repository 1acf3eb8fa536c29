"""Peak memory of a training with one method, and memory that is freed and used again.

On a GPU it is what torch's allocator says. On the CPU torch keeps no count: there it is the sum over all tensors alive
that the operators of a step have taken or given, each storage once. What an operator needs only while it runs is not
in it, so the figures of the two kinds of device are not to be compared.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.device import get_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mm_sharp.analysis.benchmark.candidates import Candidate
from mm_sharp.per_sample_loss.layout import tensors_of


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors of up to 32 MB leave; whether it does now: only with glibc.

    By default glibc gives much of it back to the system in every pass, and gets it again page by page. How much of it
    is chance: of two methods in one process one may lose a tenth of its step to it in every round, the other nothing.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 32 * 2**20))


class TensorsAlive(TorchDispatchMode):
    """Counts the bytes of the tensors alive, but those ``without``, that operators in this context took or gave."""

    def __init__(self, without: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0  # and most at once
        self._seen: dict[int, Any] = {}
        self._without = {tensor.untyped_storage()._cdata for tensor in without}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_flatten((args, kwargs, output))[0]:
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._without:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        # A storage's Python object lives as long as the storage.
        self._seen[key] = weakref.ref(storage, gone)
        self.now += size


def peak_memory(make: Callable[[], Candidate], batch: Any, steps: int) -> int | None:
    """Most bytes, but the batch's, held at once in so many steps of the method that ``make`` makes, after one step.

    None on devices of which torch keeps no count.
    """
    gc.collect()
    if get_device() == 'cuda':
        before = torch.cuda.memory_allocated()
        candidate = make()
        candidate.step(batch)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            candidate.step(batch)
        return int(torch.cuda.max_memory_allocated() - before)
    if get_device() != 'cpu':
        return None
    candidate = make()
    with TensorsAlive(tensors_of(batch)[1]) as alive:
        candidate.step(batch)
        alive.peak = alive.now
        for _ in range(steps):
            candidate.step(batch)
    return int(alive.peak)

"""Peak memory of a training with one method, and memory that is freed and used again (ours).

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mm_sharp.analysis.benchmark.steps import Candidate
from mm_sharp.per_sample_loss.layout import tensors_of

# Numbers of glibc's mallopt(3), and the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST_ON_HEAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors on the CPU leave.

    By default glibc gives much of it back to the system in every pass, and gets it again page by page. How much of it
    is chance: of two methods in one process one may lose a tenth of its step to it in every round, the other nothing.

    Returns:
        Whether it does now: only with glibc, and for tensors of up to 32 MB.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP))


class TensorsAlive(TorchDispatchMode):
    """Counts the bytes of the tensors alive that operators in this context took or gave.

    Args:
        without: Tensors that do not count.

    Attributes:
        now: Bytes alive.
        peak: Most bytes at once.
    """

    def __init__(self, without: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
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


def peak_memory(make: Callable[[], Candidate], batch: Any, steps: int, device: torch.device) -> int | None:
    """Most bytes held at once in steps of a method: model, gradients, optimizer and activations, without the batch.

    Args:
        make: Makes the method's candidate, with nothing of it in memory yet.
        batch: For all steps.
        steps: How many count, after one that does not.
        device: Where they run.

    Returns:
        Bytes; None on accelerators other than CUDA's.
    """
    gc.collect()
    if device.type == 'cpu':
        candidate = make()
        with TensorsAlive(tensors_of(batch)[1]) as alive:
            candidate.step(batch)
            alive.peak = alive.now
            for _ in range(steps):
                candidate.step(batch)
            return int(alive.peak)
    if device.type != 'cuda':
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    candidate = make()
    candidate.step(batch)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        candidate.step(batch)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)

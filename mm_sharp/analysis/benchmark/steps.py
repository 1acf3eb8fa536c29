"""Time and memory of training steps, and of perturbation and restoration alone.

A machine's speed drifts, and other programs take their share of it: in every round each method makes one step, on the
same batch, so that what slows one slows all; the order is rotated from round to round. Peak memory is on a GPU what
torch's allocator says. On the CPU it is the sum over all tensors alive that the operators of a step have taken or
given, without what an operator needs only while it runs: figures of the two are not to be compared.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from mmengine.device import get_device
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mm_sharp.analysis.benchmark.candidates import Candidate
from mm_sharp.analysis.tables import columns
from mm_sharp.errors import UsageError
from mm_sharp.ops.perturbation import Direction, perturb_
from mm_sharp.ops.tensor_backup import TensorBackup
from mm_sharp.per_sample_loss import PerSampleLossError
from mm_sharp.per_sample_loss.layout import tensors_of
from mm_sharp.samples.keys import SampleIdError
from mm_sharp.step.timing import StepTimer

T = TypeVar('T')
Measure = Callable[[Candidate, Any], T]  # of one step, given its batch
Phases = dict[str, float]
# Numbers read and written for each weight; perturbation: copy; norm; gradients times the step; weights plus that.
_COPY, _PERTURB, _RESTORE = 1 + 1, (1 + 1) + 1 + (1 + 1) + (2 + 1), 1 + 1
_FLOAT = torch.float32.itemsize
_RATES = ('copy_rate', 'climb_rate', 'restore_rate')


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    def text(self, unit: float = 1.0, form: str = '.2f') -> str:
        """In units of ``unit``."""
        low, median, high = (format(value / unit, form) for value in self)
        return f'{median} ({low} to {high})'


def quartiles(values: Sequence[float] | NDArray[np.float64]) -> Quartiles:
    """Of at least one number, interpolated between neighbours."""
    return Quartiles(*np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)).tolist())


def step_seconds(candidate: Candidate, batch: Any) -> float:
    """Time of a whole step."""
    return seconds_of(lambda: candidate.step(batch))


def phase_seconds(candidate: Candidate, batch: Any) -> Phases:
    """Times of a step's phases, by marks between them, which disturb; ``'host'`` is what is in no other phase.

    On a GPU, where the device waits for the host, that is in the phase that it waits in.
    """
    timers: list[StepTimer] = []
    total = seconds_of(lambda: timers.append(candidate.timed_step(batch)))
    seconds = timers[0].seconds()
    seconds['host'] += max(0.0, total - sum(seconds.values()))
    return seconds


@contextmanager
def without_denormals() -> Iterator[None]:
    """Take numbers below 1e-38 for 0, where the CPU can: how many gradients are so small depends on the weights."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@without_denormals()  # not while packages are imported: numpy warns of it
def measure_rounds(
    groups: Sequence[Sequence[Candidate]], batches: Sequence[Any], rounds: int, warmup: int, measure: Measure[T]
) -> dict[str, list[T]]:
    """Measure steps of all methods, in rounds of one step each, after at least one for ``warmup``.

    The methods of a group make their steps directly one after the other, and all of a round with the same batch.

    Raises UsageError: A method does not work with this model, or a loss is not finite, so that steps end early.
    """
    for number, candidate in product(range(warmup), chain(*groups)):
        _check_step(candidate, batches[number % len(batches)])
    found: dict[str, list[T]] = {candidate.name: [] for candidate in chain(*groups)}
    # Python's garbage collector, which else runs when it likes, runs between the rounds.
    gc.disable()
    gc.freeze()  # what is there already need not be looked at
    try:
        for number in range(rounds):
            gc.collect()
            first = number % len(groups)
            for candidate in chain(*groups[first:], *groups[:first]):
                found[candidate.name].append(measure(candidate, batches[(warmup + number) % len(batches)]))
    finally:
        gc.unfreeze()
        gc.enable()
    return found


def seconds_of(call: Callable[[], Any]) -> float:
    """Time of a call, from an idle device to the end of the work that the call left on it."""
    wait = getattr(torch, get_device()).synchronize  # torch.cpu's does nothing
    wait()
    if get_device() == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def _check_step(candidate: Candidate, batch: Any) -> None:
    try:
        log = candidate.step(batch)
    except (PerSampleLossError, SampleIdError) as error:
        raise UsageError(f'{error} (Or leave {candidate.name} out of --methods.)') from error
    if not math.isfinite(loss := float(torch.as_tensor(log['loss']).detach())):
        raise UsageError(f'{candidate.name}: the loss at the initial weights is {loss}: no whole step can be measured')


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors of up to 32 MB leave; whether it does now: only with glibc.

    By default glibc gives it back and gets it again page by page: by chance a tenth of one method's steps goes to that,
    and nothing of another's.
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


def measure_perturbing(parameters: int, rounds: int) -> dict[str, Any]:
    """Copy, perturb and restore so many weights, in interleaved rounds, after one that is not timed.

    Returns bytes a second of one copy of all weights in one piece, of the perturbation with its copy (``climb_rate``)
    and of the restoration; ``share_of_copy``: those of the last two over the copy's.
    """
    shapes = resnet_shapes(parameters)
    (flat_weights, weights), (flat_gradients, gradients) = (_allocate(shapes) for _ in range(2))
    backup = TensorBackup()

    def perturb() -> None:
        backup.save(weights)
        perturb_(weights, gradients, Direction(0.05))

    # The gradients are scratch memory after a perturbation: the copy also makes new ones.
    calls: list[Callable[[], object]] = [partial(flat_gradients.copy_, flat_weights), perturb, backup.restore]
    moved = [_COPY * flat_weights.numel(), _PERTURB * parameters, _RESTORE * parameters]
    seconds = [[seconds_of(call) for call in calls] for _ in range(rounds + 1)][1:]
    pairs = zip(moved, zip(*seconds, strict=True), strict=True)
    rates = [quartiles([_FLOAT * numbers / taken for taken in times]) for numbers, times in pairs]
    together = (_PERTURB + _RESTORE) / (_PERTURB / rates[1].median + _RESTORE / rates[2].median)
    named = dict(zip(_RATES, rates, strict=True))
    return {'parameters': parameters, 'tensors': len(shapes), **named, 'share_of_copy': together / rates[0].median}


def resnet_shapes(parameters: int) -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50's tensors, again and again until there are as many weights; the last one is cut."""
    from torchvision.models import resnet50

    with torch.device('meta'):
        resnet: list[tuple[int, ...]] = [tuple(parameter.shape) for parameter in resnet50().parameters()]
    shapes: list[tuple[int, ...]] = []
    while parameters:
        shape = resnet[len(shapes) % len(resnet)]
        shapes.append(shape if torch.Size(shape).numel() <= parameters else (parameters,))
        parameters -= torch.Size(shapes[-1]).numel()
    return shapes


def _allocate(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and tensors in it, at multiples of 512 bytes, as torch's allocators have it."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-size // 128) * 128 for size in sizes]
    flat = torch.linspace(-1, 1, sum(rooms), device=get_device())
    parts = zip(flat.split(rooms), sizes, shapes, strict=True)
    return flat, [part[:size].view(shape) for part, size, shape in parts]


def perturbing_table(costs: Sequence[Mapping[str, Any]]) -> str:
    """The costs as text, and which bytes are counted."""
    lines = [['weights', 'tensors', 'copy, GB/s', 'perturb, GB/s', 'restore, GB/s', 'both over copy']]
    for cost in costs:
        rates = (cost[key].text(1e9) for key in _RATES)
        share = f'{100 * cost["share_of_copy"]:.0f} %'
        lines.append([f'{cost["parameters"]:,}', f'{cost["tensors"]:,}', *rates, share])
    return (
        f'{columns(lines)}\nCounted, in float32: for each weight {_PERTURB} numbers read or written by the '
        f'perturbation (2 copy, 1 norm, 2 scaling, 3 addition), {_RESTORE} by the restoration, {_COPY} by the copy.'
    )

"""The passes of a method alone: the floor under its step, on this model and this device (ours).

The limits by arithmetic take a backward pass for twice a forward pass, half a batch for half of a whole one, and a
weight's gradient that is not computed for a third of its layer's work. Where that is not so, no code of ours can bring
a step down to them. A floor is measured: the same forward and backward passes on batches of the same sizes, with the
same gradients left out, and the base optimizer's step; no climb, no restoration, no losses of samples, nothing kept or
checked. What a method's step takes above its floor is the method's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mm_sharp.analysis.benchmark.autocast import autocast_to
from mm_sharp.analysis.benchmark.compare import Quartiles, quartiles
from mm_sharp.analysis.benchmark.methods import StepLimit
from mm_sharp.analysis.benchmark.steps import Candidate
from mm_sharp.ops.frozen_params import FrozenParams
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.parameters import ParameterSelector, parameters_of, trained_by
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.ops.rng import RandomState
from mm_sharp.samples.selection import sample_count
from mm_sharp.samples.subset import subset

# After a method's name: the floor under it.
SUFFIX = ', passes alone'


@dataclass(frozen=True)
class Pass:
    """One forward pass and what follows it.

    Args:
        samples: How many of the batch.
        gradients: Share of the perturbed tensors whose gradients are computed, the others' being left out; None for no
            backward pass at all.
    """

    samples: int
    gradients: float | None = 1.0


def passes_of(kind: str, settings: Mapping[str, Any], batch_size: int) -> list[Pass] | None:
    """The passes of a method's step; for a method that selects by its history, of a step between refreshes.

    Args:
        kind: Name of the optimizer wrapper's class.
        settings: All its arguments.
        batch_size: Samples in the batch.

    Returns:
        None for a wrapper that is none of this package's.
    """
    whole = Pass(batch_size)
    if kind == 'SAMOptimWrapper':
        return [whole, whole]
    if kind == 'AUSAMOptimWrapper':
        return [Pass(sample_count(settings['sampling_ratio'], batch_size))] * 2
    if kind != 'ESAMOptimWrapper':
        return None
    kept = sample_count(settings['gamma'], batch_size)
    selects = kept < batch_size and (settings['selection'] == 'exact' or settings['refresh'] == 1)
    selection = [Pass(batch_size, gradients=None)] if selects else []
    return [Pass(batch_size, gradients=settings['beta']), *selection, Pass(kept)]


@dataclass(frozen=True)
class Floor(Candidate):
    """A step of nothing but passes and the base optimizer's own.

    Args:
        passes: At least one; the last one's gradients are stepped with.
        batch_size: Samples in a batch.
        selector: Which parameters are perturbed, where some gradients are left out.
        autocast: Makes the context of a forward pass.
    """

    passes: Sequence[Pass]
    batch_size: int
    selector: ParameterSelector
    autocast: Callable[[], AbstractContextManager[Any]]
    # A part of a batch by the batch and its samples: taking a batch apart is the method's own work.
    _parts: dict[tuple[int, int], Any] = field(default_factory=dict)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def step(self, batch: Any) -> dict[str, Any]:
        """One whole step; returns what there is to log."""
        log: dict[str, Any] = {}
        for one in self.passes:
            log = self._run(one, self._part(batch, one.samples))
        self.optim_wrapper.optimizer.step()
        self.optim_wrapper.optimizer.zero_grad()
        return log

    def _run(self, one: Pass, batch: Any) -> dict[str, Any]:
        switch = FrozenParams()
        switch.freeze(self._left_out(one.gradients))
        try:
            with self.autocast(), nullcontext() if one.gradients is not None else torch.no_grad():
                data = self.model.data_preprocessor(batch, True)
                losses = self.model._run_forward(data, mode='loss')
            loss, log = self.model.parse_losses(losses)
            if one.gradients is not None:
                # The first pass's gradients are of no use to the second.
                self.optim_wrapper.optimizer.zero_grad()
                loss.backward()
        finally:
            switch.unfreeze()
        return dict(log)

    def _left_out(self, share: float | None) -> list[nn.Parameter]:
        if share is None or share == 1.0:
            return []
        trained = trained_by(self.optim_wrapper.optimizer)
        perturbed = self.selector.select(self.model, trained)
        mask = weight_mask(len(perturbed), share, self._generator)
        taken = {id(parameter) for parameter, is_taken in zip(perturbed, mask, strict=True) if is_taken}
        return [parameter for parameter in trained if id(parameter) not in taken]

    def _part(self, batch: Any, samples: int) -> Any:
        """The first ``samples`` of a batch."""
        if samples == self.batch_size:
            return batch
        key = id(batch), samples
        if key not in self._parts:
            named = isinstance(batch, Mapping)
            args, kwargs = ((), dict(batch)) if named else (tuple(batch), {})
            call = ModelCall(self.model, args, kwargs, RandomState.capture())
            part = subset(call, np.arange(samples), self.batch_size)
            self._parts[key] = part.kwargs if named else part.args
        return self._parts[key]


def make_floor(candidate: Candidate, settings: Mapping[str, Any], batch_size: int) -> Floor:
    """The floor under a method's step.

    Args:
        candidate: The base optimizer, with a model of its own.
        settings: All arguments of the method's optimizer wrapper, and the name of its class as ``type``.
        batch_size: Samples in a batch.
    """
    passes = passes_of(settings['type'], settings, batch_size)
    assert passes is not None, 'only methods of this package have floors'
    autocast = autocast_to(settings['dtype'], parameters_of(candidate.optim_wrapper.optimizer)[0].device)
    selector = ParameterSelector(candidate.name, settings['perturb'])
    return Floor(candidate.name, candidate.model, candidate.optim_wrapper, passes, batch_size, selector, autocast)


def own_work(
    times: Mapping[str, Sequence[float]], limits: Mapping[str, StepLimit | None], steps_before: int
) -> dict[str, Quartiles]:
    """What each method's step takes above its floor, in steps of the base optimizer, by method.

    Args:
        times: Seconds of each round's step, of methods and floors.
        limits: By method; of a cycle, the costlier steps are left out.
        steps_before: Steps that each method had made before.
    """
    found: dict[str, Quartiles] = {}
    base = np.asarray(times['base'], np.float64)
    for name in times:
        if name + SUFFIX not in times:
            continue
        limit = limits[name]
        assert limit is not None, 'what has a floor has a limit'
        above = (np.asarray(times[name], np.float64) - np.asarray(times[name + SUFFIX], np.float64)) / base
        found[name] = quartiles(above[~limit.costlier(len(base), steps_before)])
    return found

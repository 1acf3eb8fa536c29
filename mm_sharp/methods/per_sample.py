"""What ESAM and AUSAM share: per-sample losses, a history of them, draws that a checkpoint can go on with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_number, some
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.ops.model_call import ModelCall, unwrap
from mm_sharp.per_sample_loss import LossRecord, PerSampleLoss
from mm_sharp.samples.history import Keys, PendingUpdates, SampleHistory
from mm_sharp.samples.keys import keys_of
from mm_sharp.samples.seeds import RngStream, make_generator, shared_seed
from mm_sharp.samples.subset import fewest_samples
from mm_sharp.step.checks import check_compiled
from mm_sharp.step.nonfinite_log import offending_samples
from mm_sharp.step.wrapper import TwoPassOptimWrapper


class PerSampleOptimWrapper(TwoPassOptimWrapper):
    """Base of the wrappers that look at the loss of every sample.

    Args:
        optimizer: The base optimizer.
        history_momentum: Weight of the past in an exponential average of the loss differences, in [0, 1); None for the
            average over all visits.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Attributes:
        history: Average loss difference of every sample seen.
        pending_updates: The last step's loss differences, on their way into the history.
        steps: Steps (micro-batches) taken so far.
        number: Which of several wrappers it is, each of which draws independently: its place in a Runner's
            ``OptimWrapperDict``, which a hook sets. In a loop of your own with several wrappers, set it yourself.
        rank_states: Each rank's :meth:`rank_state` when the history was exchanged last; empty in a single process.
        dataset_size: Samples in the training set, where known: for the log.
    """

    def __init__(self, optimizer: Optimizer, *, history_momentum: float | None = None, **kwargs: Any) -> None:
        if history_momentum is not None:
            name = type(self).__name__
            check_number(name, 'history_momentum', history_momentum, high=1.0, high_open=True, example='0.9')
        super().__init__(optimizer, **kwargs)
        self.history = SampleHistory(history_momentum, distributed=get_world_size() > 1)
        self.pending_updates = PendingUpdates(self.history)
        self.steps = 0
        self.rank_states: list[Any] = []
        self.dataset_size: int | None = None
        self.number = 0
        self._seed: int | None = None
        self._fewest: tuple[nn.Module | None, int] = (None, 1)
        self._per_sample: PerSampleLoss | None = None
        self._record: LossRecord | None = None
        self._measured: tuple[Keys, HostCopy] | None = None

    @property
    def uses_history(self) -> bool:
        """Whether the method keeps a history at all."""
        return True

    @property
    def seed(self) -> int:
        """The seed of all draws, the same on all ranks; settled when it is first asked for, which all ranks must do."""
        if self._seed is None:
            self._seed = shared_seed()
        return self._seed

    def generator(self, kind: RngStream, *, shared: bool = False) -> torch.Generator:
        """A generator for a draw of this step; with ``shared`` all ranks draw the same."""
        rank, number = () if shared else (get_rank(),), (self.number,) if self.number else ()
        return make_generator(self.seed, kind, *rank, self.steps, *number)

    def keys(self, call: ModelCall, size: int) -> Keys:
        """The keys of the ``size`` samples in a call; a SampleIdError if they have none."""
        return keys_of(call.args, call.kwargs, size, type(self).__name__)

    def fewest(self, model: nn.Module) -> int:
        """The fewest samples of a batch that ``model`` can be trained on."""
        if self._fewest[0] is not model:
            self._fewest = model, fewest_samples(model)
        return self._fewest[1]

    def record(self) -> LossRecord:
        """What was recorded of the first pass."""
        assert self._record is not None, 'recording() is around every forward'
        return self._record

    def losses_of(self, model: nn.Module) -> PerSampleLoss:
        """The recorder of a model's per-sample losses, one for the whole training; an UnsupportedError without any."""
        if self._per_sample is None or self._per_sample.model is not unwrap(model):
            check_compiled(type(self).__name__, model, sees_losses=True, switches=False)
            self._per_sample = PerSampleLoss(model, around=partial(self.exclude_from_timing, 'recording'))
        return self._per_sample

    def losses_in_words(self, model: nn.Module | None) -> dict[str, str]:
        """Where the losses of samples come from, for the start of the log."""
        if model is None:
            return {}
        names = [loss.name for loss in self.losses_of(model).losses]
        return {'losses': f'of each sample, from {some(names)}' if names else "the model's own, of shape (N,)"}

    def visit(self, keys: Keys, differences: Tensor) -> None:
        """Have the history take up the loss differences of ``keys`` if the step comes to its end."""
        # Copied now: behind the second backward pass, the next step would wait for all of this one.
        self._measured = keys, HostCopy(differences)

    def differences(self, before: Tensor, after: Tensor, norm: Tensor) -> Tensor:
        """``l_i(w + e) - l_i(w)``, (N,), float32; NaN, which is no visit, where there was no perturbation."""
        if norm.is_cpu and math.isfinite(value := norm.item()) and value > 0:
            return after - before
        perturbed = (torch.isfinite(norm) & (norm > 0)).to(before.device)
        return torch.where(perturbed, after - before, torch.nan)

    def offending_samples(self, call: ModelCall) -> str:
        """The samples of ``call`` in which, or else in whose loss or loss difference, something is not finite."""
        losses = None if self._record is None else self._record.values()
        if (losses is None or losses.isfinite().all()) and self._measured is not None:
            losses = torch.from_numpy(self._measured[1].numpy())
        rows = [] if losses is None else [int(row) for row in (~losses.isfinite()).nonzero().flatten()]
        return offending_samples(type(self).__name__, call, rows)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the losses of the first pass, and report what an accelerator has found of the step before."""
        with self.losses_of(model).record() as self._record:
            yield
        self._flush_checks()

    def _flush_checks(self) -> None:
        # Behind the forward, which the device has to do while the host waits for what came before.
        if self._per_sample is not None:
            self._per_sample.flush()

    def update_params(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """See :meth:`TwoPassOptimWrapper.update_params`; a step that fails draws the same again."""
        self._measured = None
        super().update_params(loss, *args, **kwargs)
        self.steps += 1
        if self._measured is not None:
            self.pending_updates.add(*self._measured)

    def own_state(self) -> dict[str, Any]:
        """Seed and number of the draws, the history, and the last step's differences on their way into it."""
        return {
            'seed': self._seed,
            'member': {'number': self.number},
            'steps': self.steps,
            'history': self.history.state_dict(),
            'visits': self.pending_updates.state_dict(),
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the draws and the history of a checkpoint; of a method without them, begin anew."""
        # Rank 0's, as far as they were not exchanged: on every rank they would count as often.
        self.pending_updates.load_state_dict(state.get('visits', {}) if get_rank() == 0 else {})
        self._seed, self.steps = state.get('seed'), state.get('steps', 0)
        self.number = state.get('member', {}).get('number') or 0
        empty = SampleHistory(self.history.momentum).state_dict()
        self.history.load_state_dict(state.get('history', empty))

    def log_scalars(self) -> dict[str, float]:
        """``share_seen``: share of the training set's samples in the history, where the set's size is known."""
        if not self.uses_history or self.dataset_size is None:
            return {}
        return {'share_seen': min(1.0, len(self.history) / self.dataset_size)}

    def exchange_history(self) -> None:
        """Bring the history up to date and, with several ranks, to the same state on all: all of them must call it."""
        self.pending_updates.flush()
        if self.uses_history and self.history.distributed:
            gathered = all_gather_object((self.history.pending(), self.rank_state()))
            self.history.merge([pending for pending, _ in gathered])
            self.rank_states = [state for _, state in gathered]

    def rank_state(self) -> Any:
        """What a checkpoint, which rank 0 writes, must hold of every rank; brought together with the history."""
        return None

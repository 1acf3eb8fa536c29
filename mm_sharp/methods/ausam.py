"""AUSAM: sharpness-aware minimization on samples drawn by their gradient norm, at the base optimizer's cost.

AUSAM (Deng et al., AAAI 2025, arXiv 2406.08001) draws K of the N samples of each mini-batch and runs *both* of SAM's
passes on these alone: 2 * K / N of the base optimizer's cost. A sample is drawn by its gradient norm, which the
difference of its loss before and after the perturbation estimates at no further cost::

    score_i = average over its visits of |l_i(w + e) - l_i(w)|
    z_i     = (score_i - min) / (max - min)                       within the mini-batch
    s_i     = s_min + (s_max - s_min) * z_i                       the likelier to be among the K

The defaults are those of its first author's code for CIFAR (github.com/ajiaaa/AUSAM, commit 13ee7bf): K is half of N,
the first epoch uses whole batches, s_min is 0.1, and s_max rises from there to 0.5 over the first 15 % of the training
(:mod:`mm_sharp.samples.schedule`). The paper's settings for pose estimation are not known. Ours is what the arguments
and :mod:`mm_sharp.samples.selection` say is ours, and drawing in the data loader. docs/sampling_study.md has what our
additions gave.

A loss that is the sum of its samples' is scaled by N / K, so that a step is as long as on the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
from mmengine.dist import get_world_size
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import UserError
from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from mm_sharp.ops.host_copy import to_device
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.samples.ausam_sampler import AUSAMSampler
from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.draw import BatchDraw, BatchDrawer
from mm_sharp.samples.history import Keys
from mm_sharp.samples.loss_scale import LossScale
from mm_sharp.samples.schedule import (
    AFTER_RAMP,
    CHOICES,
    Schedule,
    TrainingLength,
    TrainingPlace,
    Unset,
    checked_schedule,
    schedule_of,
)
from mm_sharp.samples.seeds import RngStream
from mm_sharp.samples.selection import Preference, sample_count
from mm_sharp.samples.subset import call_size, one_is_enough, subset
from mm_sharp.step.method import Cost


@OPTIM_WRAPPERS.register_module()
class AUSAMOptimWrapper(PerSampleOptimWrapper):
    """Asymptotic unbiased sampling for sharpness-aware minimization, as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation; 0.05 is the SAM paper's default.
        sampling_ratio: Share of each mini-batch that is drawn, in (0, 1]; K = ceil(sampling_ratio * N). 0.5, the
            authors', costs what the base optimizer costs; a batch that is used whole, what SAM costs. K is at least 2
            (of several) where the model has a ``BatchNorm1d``, which cannot normalise a single row (ours).
        s_min: Normalised score of the smallest, > 0. ``s_max / s_min`` bounds how much likelier one sample is drawn
            than another; with ``s_min == s_max`` the draw is uniform.
        s_max: Normalised score of the largest, >= ``s_min``.
        reweight: Weight the samples by 1 / (N * pi_i) (Horvitz-Thompson), which makes the first pass's gradient an
            unbiased estimate of the whole batch's (ours). A uniform draw's is one as it is.
        history_momentum: Weight of the past in an exponential average of the loss differences, in [0, 1); by default
            the average over all visits (ours).
        prefer: Which average loss differences make a sample likelier to be drawn: ``'large'``, the authors', which
            prefers wrongly labelled samples, too; or ``'small'`` (ours), with which ``s_min`` is the largest's and
            ``s_max`` the smallest's. ``reweight`` takes back what the preference does to the gradient.
        clip_quantile: Scores above this quantile of the mini-batch's, in (0, 1], count as equal to it (ours), so that
            one outlier does not make all others the same; 1 clips nothing.
        draw: ``'sequential'``, one sample after the other as in the authors' code; ``'systematic'``, exact inclusion
            probabilities (ours), the default with ``reweight``; or ``'uniform'``, whatever the samples are (ours):
            without scores, and so for every model whose batch can be cut.
        schedule: What the arguments that are not given are: ``'authors'``, or ``'constant'``, which was this package's
            before it had the authors': ``sampling_ratio=0.6, s_min=0.3, s_max=1.0, ramp=0, whole_first_epoch=False,
            draw='systematic'``. By default the authors', but for configs of that time: see
            :func:`mm_sharp.samples.schedule.schedule_name`.
        ramp: Share of the training, by epochs, over which ``s_max`` rises from ``s_min``, in [0, 1]; 0.15 is the
            authors'. With 0 it does not change.
        whole_first_epoch: Use the batches of the first epoch whole, so that every sample is measured once; by default
            as the schedule has it: the authors' do.
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Attributes:
        drawer: Draws the samples.
        length: How long the training is; a Runner's hook sets it, and None means that nobody knows.
        place: Where in the training the next step is; a Runner's hook sets it. In a training loop of your own, set
            ``wrapper.place = TrainingLength(epochs, len(loader)).place(epoch)`` when an epoch begins, or have the ramp
            alone go by iterations, ``wrapper.initialize_count_status(model, 0, max_iters)``. With neither, draws are
            what they are after the ramp, from the first step on.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        sampling_ratio: float = Unset(0.5),
        s_min: float = Unset(0.1),
        s_max: float = Unset(0.5),
        reweight: bool = False,
        history_momentum: float | None = None,
        prefer: str = 'large',
        clip_quantile: float = 1.0,
        draw: str | None = None,
        schedule: str | None = None,
        ramp: float = Unset(0.15),
        whole_first_epoch: bool | None = None,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = dict(
            sampling_ratio=sampling_ratio, s_min=s_min, s_max=s_max, reweight=reweight, prefer=prefer, draw=draw,
            history_momentum=history_momentum, clip_quantile=clip_quantile, schedule=schedule, ramp=ramp,
            whole_first_epoch=whole_first_epoch,
        )  # fmt: skip
        plan = checked_schedule(type(self).__name__, settings)
        super().__init__(optimizer, history_momentum=history_momentum, rho=rho, **kwargs)
        self.reweight = reweight and plan.draw != 'uniform'
        preference = Preference(prefer == 'small', float(clip_quantile))
        self.drawer = BatchDrawer(self.history, plan, preference)
        self.length: TrainingLength | None = None
        self.place: TrainingPlace | None = None
        self.sampler: AUSAMSampler | None = None
        self._sampler_states: list[Any] = []
        self._draw: BatchDraw | None = None
        self._keys: Keys = []
        self._scale = LossScale()

    @classmethod
    def theoretical_cost(cls, batch_size: int, **settings: Any) -> Cost:
        """Twice the share that is drawn, and SAM's in a whole first epoch."""
        return _cost(schedule_of(settings), batch_size)

    def cost(self, batch_size: int) -> Cost:
        """What the drawer's settings cost."""
        return _cost(self.drawer.schedule, batch_size, self.drawer.fewest)

    def in_words(self, batch_size: int, length: TrainingLength, model: nn.Module | None) -> dict[str, str]:
        """See :meth:`mm_sharp.step.method.Method.in_words`."""
        losses = self.losses_in_words(model) if self.uses_history else {}
        weights = '; each weighted by 1 / (N * pi_i)' if self.reweight else ''
        loaded = '; drawn by the data loader, which reads no others' if self.sampler is not None else ''
        return {'samples': f'{self.drawer.in_words(batch_size, length)}{weights}{loaded}', **losses}

    def attach_sampler(self, sampler: AUSAMSampler, dataset_keys: DatasetKeys, rank: int, model: nn.Module) -> None:
        """Take the batches that ``sampler`` has drawn, instead of drawing from batches that are loaded already.

        A UserError if steps of one pass come between: they are the base optimizer's, on whole batches.
        """
        if self.alternates:
            raise UserError(
                f'{type(self).__name__}: AUSAMSampler leaves out samples in every step, and only some have both '
                "passes: take batch_sampler=dict(type='AUSAMSampler') out of train_dataloader, or have both in all"
            )
        self.drawer.fewest = self.fewest(model)
        sampler.attach(self.drawer, dataset_keys, self.seed, rank, self.length)
        # With another number of ranks the batches are others.
        if len(self._sampler_states) == get_world_size() and self._sampler_states[rank] is not None:
            sampler.load_state_dict(self._sampler_states[rank])
        self.sampler, self._sampler_states = sampler, []

    @property
    def uses_history(self) -> bool:
        """A uniform draw has none."""
        return self.drawer.schedule.draw != 'uniform'

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """See :meth:`PerSampleOptimWrapper.recording`; of a uniform draw the losses of samples are not recorded."""
        self._draw = None
        owner, drop = type(self).__name__, 'drop_last=True'
        leave_out = drop if self.sampler is None else f"batch_sampler=dict(type='AUSAMSampler', {drop})"
        with (
            one_is_enough(owner, 'sampling_ratio', lambda: self._draw.counts if self._draw else None, leave_out),
            super().recording(model) if self.uses_history else self._scale.applied(model),
        ):
            yield

    def first_batch(self, call: ModelCall) -> ModelCall:
        """The call on the samples that are drawn; they must have ids, but for a uniform draw."""
        self.pending_updates.flush()
        self.drawer.fewest = self.fewest(call.model)
        size = call_size(type(self).__name__, call)
        needs_keys = self.uses_history or self.sampler is not None
        keys: Keys = self.keys(call, size) if needs_keys else [('', 0)] * size
        if self.sampler is not None:
            draw = self.sampler.take(keys)
        else:
            draw = self.drawer.draw(keys, self.generator(RngStream.SAMPLES), self._place_now())
            if len(draw.chosen) < size:
                keys = [keys[row] for row in draw.chosen]
                call = subset(call, draw.chosen, size)
        self._draw, self._keys = draw, keys
        if self.uses_history:  # the loss modules of both passes are to scale, or weight, their samples
            record = self.record()
            record.full_size = draw.size
            if self.reweight:
                record.weights = to_device(draw.weights.astype(np.float32), self.device)
        else:
            kept = len(draw.chosen)
            self._scale.next_step(kept, draw.size)
            if self.drawer.schedule.sampling_ratio < 1.0 and self._scale.is_to_try(self.device):
                twice = subset(call, np.tile(np.arange(kept), 2), kept)
                self._scale.expect(self.second_pass.try_forward(twice))
        return call

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The second forward on the same samples; their loss differences go to the history."""
        if not self.uses_history:
            with self._scale.applied(call.model):
                return super().perturbed_loss(call, loss, norm)
        first, draw = self.record(), self._draw
        assert draw is not None
        with self.losses_of(call.model).record(first.weights, first.full_size) as record:
            second = self.second_pass.loss(call)
        with self.exclude_from_timing('recording'):
            differences = self.differences(first.losses(loss), record.losses(second), norm)
            self.visit(self._keys, differences)
        self._metrics = partial(_metrics_of, differences, draw)
        return second, second.detach()

    def own_state(self) -> dict[str, Any]:
        """The history and the draws, those of the data loader's batches that are in flight included."""
        state = super().own_state()
        if self.sampler is not None:
            state['samplers'] = self.rank_states or [self.rank_state()]
        if not self.uses_history:
            state['reductions'] = self._scale.state_dict()
        return state

    def rank_state(self) -> Any:
        """The draws of this rank's batches that are in flight."""
        return None if self.sampler is None else self.sampler.state_dict()

    def load_own_state(self, state: Any) -> None:
        """See :meth:`PerSampleOptimWrapper.load_own_state`."""
        super().load_own_state(state)
        self._sampler_states = state.get('samplers', [])
        self._scale.load_state_dict(state.get('reductions', {}))

    def _place_now(self) -> TrainingPlace:
        """Where in the training this step is."""
        if self.place is not None:
            return self.place
        if self._max_counts > 0:  # initialize_count_status was called: how long the training is, but not its epochs
            return TrainingLength(self._max_counts, None).place(0, self._inner_count)
        return AFTER_RAMP


def _metrics_of(differences: Tensor, draw: BatchDraw) -> dict[str, float]:
    return {'mean_difference': differences.nanmean().item(), **draw.scalars()}


def _cost(plan: Schedule, batch_size: int, fewest: int = 1) -> Cost:
    k = sample_count(plan.sampling_ratio, batch_size, fewest)
    step = 2 * k / batch_size
    return Cost(step, step, first_epoch=2.0 if plan.whole_first_epoch and k < batch_size else None)

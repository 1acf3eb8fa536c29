"""AUSAM: sharpness-aware minimization on samples drawn by their gradient norm, at the base optimizer's cost.

AUSAM (Deng et al., AAAI 2025, arXiv 2406.08001) draws K = ceil(sampling_ratio * N) samples of each mini-batch and runs
*both* of SAM's passes on these alone: 2 * sampling_ratio of the base optimizer's cost. A sample is drawn by its
gradient norm, which the difference of its loss before and after the perturbation estimates at no further cost::

    score_i = average over its visits of |l_i(w + e) - l_i(w)|
    z_i     = (score_i - min) / (max - min)                       within the mini-batch
    s_i     = s_min + (s_max - s_min) * z_i
    pi_i    = K * s_i / sum(s), capped at 1                       probability to be among the K

Only the paper's abstract and public summaries of it were at hand. Ours, as they leave it open: samples never seen take
``s_max``; ``s_min``'s default; the cap; systematic sampling, which gives exactly these probabilities and exactly K
samples; ``history_momentum``; drawing in the data loader; and ``reweight``, which weights sample i by 1 / (N * pi_i)
(Horvitz-Thompson), so that at fixed weights the drawn samples' gradient is an unbiased estimate of the whole batch's.
The first pass's is; the second's is taken at a point that depends on the draw.

Large scores are those of hard samples and of wrongly labelled ones, which the paper's draw therefore prefers.
``prefer='small'`` (ours) turns the preference round, ``1 - z_i`` in place of ``z_i``: for training sets with wrong
labels. ``clip_quantile`` (ours) sets all scores above a quantile of the mini-batch's equal to it before the
normalisation, so that one outlier does not make all others the same. docs/sampling_study.md has what they gave.

A loss that is the sum of its samples' is scaled by N / K, so that a step is as long as on the whole batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import UserError, check_bool, check_choice, check_number
from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from mm_sharp.ops.host_copy import to_device
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.samples.draw import BatchDraw, BatchDrawer
from mm_sharp.samples.history import Keys
from mm_sharp.samples.seeds import RngStream
from mm_sharp.samples.selection import Preference, sample_count
from mm_sharp.samples.subset import call_size, fewest_samples, one_is_enough, subset
from mm_sharp.step.method import Cost

if TYPE_CHECKING:
    from mm_sharp.samples.ausam_sampler import AUSAMSampler


@OPTIM_WRAPPERS.register_module()
class AUSAMOptimWrapper(PerSampleOptimWrapper):
    """Asymptotic unbiased sampling for sharpness-aware minimization, as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation; 0.05 is the SAM paper's default.
        sampling_ratio: Share of each mini-batch that is drawn, in (0, 1]; K = ceil(sampling_ratio * N). 0.5 costs what
            the base optimizer costs, 0.6 a fifth more; a batch of one sample, or another that is used whole, what SAM
            costs. K is at least 2 (of several) where the model has a ``BatchNorm1d``, which cannot normalise a single
            row (ours).
        s_min: Normalised score of the smallest, > 0. ``s_max / s_min`` bounds how much likelier one sample is drawn
            than another; with ``s_min == s_max`` the draw is uniform.
        s_max: Normalised score of the largest, >= ``s_min``.
        reweight: Weight the samples by 1 / (N * pi_i), which makes their gradient at given weights an unbiased estimate
            of the whole batch's (ours).
        prefer: Which average loss differences make a sample likelier to be drawn: ``'large'``, the paper's, or
            ``'small'`` (ours), with which ``s_min`` is the largest's and ``s_max`` the smallest's. ``reweight`` takes
            back what the preference does to the gradient.
        clip_quantile: Scores above this quantile of the mini-batch's, in (0, 1], count as equal to it (ours); 1 clips
            nothing.
        history_momentum: Weight of the past in an exponential average of the loss differences, in [0, 1); by default
            the average over all visits (ours).
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.

    Example:
        In a config, with everything else as it was::

            custom_imports = dict(imports=['mm_sharp'])
            optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.6,
                                 optimizer=dict(type='Adam', lr=5e-4))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        sampling_ratio: float = 0.6,
        s_min: float = 0.3,
        s_max: float = 1.0,
        reweight: bool = False,
        history_momentum: float | None = None,
        prefer: str = 'large',
        clip_quantile: float = 1.0,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        check_number(name, 'sampling_ratio', sampling_ratio, high=1.0, low_open=True, example='0.6')
        check_number(name, 's_min', s_min, low_open=True, example='0.3')
        check_number(name, 's_max', s_max, low_open=True, example='1.0')
        if s_max < s_min:
            raise UserError(
                f'{name}: s_max={s_max!r} is not allowed: it must be a finite number in [{s_min:g}, inf), with '
                f"s_min={s_min!r}. Write for example: optim_wrapper = dict(type='{name}', s_max={max(1.0, s_min)!r}, "
                '...)'
            )
        check_choice(name, 'prefer', prefer, ('large', 'small'))
        check_number(name, 'clip_quantile', clip_quantile, high=1.0, low_open=True, example='0.9')
        self.reweight = check_bool(name, 'reweight', reweight)
        super().__init__(optimizer, history_momentum=history_momentum, rho=rho, **kwargs)
        preference = Preference(prefer == 'small', float(clip_quantile))
        self.drawer = BatchDrawer(self.history, float(sampling_ratio), float(s_min), float(s_max), preference)
        self.sampler: AUSAMSampler | None = None
        self._sampler_states: list[Any] = []
        self._draw: BatchDraw | None = None
        self._keys: Keys = []
        self._attached: nn.Module | None = None
        self._has_said_what_it_costs = False

    @classmethod
    def theoretical_cost(cls, batch_size: int, sampling_ratio: float = 0.6, **settings: Any) -> Cost:
        """Twice the share that is drawn."""
        share = sample_count(sampling_ratio, batch_size) / batch_size
        return Cost(2 * share, 2 * share)

    def attach_sampler(self, sampler: AUSAMSampler, dataset_keys: Any, rank: int) -> None:
        """Take the batches that ``sampler`` has drawn, instead of drawing from batches that are loaded already.

        Args:
            sampler: The batch sampler of the training data loader.
            dataset_keys: Gives it the keys of its samples: :class:`mm_sharp.samples.dataset_keys.DatasetKeys`.
            rank: This process's rank.
        """
        sampler.attach(self.drawer, dataset_keys, self.seed, rank)
        # With another number of ranks the batches are others.
        if len(self._sampler_states) == get_world_size() and self._sampler_states[rank] is not None:
            sampler.load_state_dict(self._sampler_states[rank])
        self.sampler, self._sampler_states = sampler, []

    def attach_model(self, model: nn.Module) -> None:
        """Fit the draws to what ``model`` can be trained on."""
        if self._attached is not model:
            self.drawer.fewest = fewest_samples(model)
            self._attached = model

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """See :meth:`PerSampleOptimWrapper.recording`."""
        self._draw = None

        def counts() -> tuple[int, int]:
            return (0, 0) if self._draw is None else (len(self._draw.chosen), self._draw.size)

        with (
            one_is_enough(type(self).__name__, 'sampling_ratio', counts, self._leave_out),
            super().recording(model),
        ):
            yield

    def first_batch(self, call: ModelCall) -> ModelCall:
        """The call on the samples that are drawn.

        Raises:
            SampleIdError: The samples have no id; the message shows how to give them one.
            ValueError: None of the arguments is a batch.
        """
        self.visits.flush()
        self.attach_model(call.model)
        size = call_size(type(self).__name__, call)
        keys = self.keys(call, size)
        if self.sampler is not None:
            draw = self.sampler.take(keys)
        else:
            draw = self.drawer.draw(keys, self.generator(RngStream.SAMPLES))
            if len(draw.chosen) < size:
                keys = [keys[row] for row in draw.chosen]
                call = subset(call, draw.chosen, size)
        self._draw, self._keys = draw, keys
        self._say_what_it_costs(draw)
        self._weigh()
        return call

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The second forward on the same samples; their loss differences go to the history."""
        first, draw = self.record(), self._draw
        assert draw is not None
        with self.losses_of(call.model).record(first.weights, first.full_size) as record:
            second = self.second_pass.loss(call)
        with self.exclude_from_timing('recording'):
            differences = self.differences(first.losses(loss), record.losses(second), norm)
            self.visit(self._keys, differences)
        self._metrics = lambda: {'mean_difference': differences.nanmean().item(), **draw.scalars()}
        return second, second.detach()

    def own_state(self) -> dict[str, Any]:
        """The history and the draws, those of the data loader's batches that are in flight included."""
        state = super().own_state()
        if self.sampler is not None:
            state['samplers'] = self.rank_states or [self.rank_state()]
        return state

    def rank_state(self) -> Any:
        """The draws of this rank's batches that are in flight."""
        return None if self.sampler is None else self.sampler.state_dict()

    def load_own_state(self, state: Any) -> None:
        """See :meth:`PerSampleOptimWrapper.load_own_state`."""
        super().load_own_state(state)
        self._sampler_states = state.get('samplers', [])

    @property
    def _leave_out(self) -> str:
        """What leaves the last, incomplete batch of an epoch out, in ``train_dataloader``."""
        drop = 'drop_last=True'
        return drop if self.sampler is None else f"batch_sampler=dict(type='AUSAMSampler', {drop})"

    def _say_what_it_costs(self, draw: BatchDraw) -> None:
        if self._has_said_what_it_costs or len(draw.chosen) < draw.size or self.drawer.sampling_ratio == 1.0:
            return
        self._has_said_what_it_costs = True
        print_log(
            f'{type(self).__name__}: a batch of {draw.size} is used whole, so its step costs what a step of SAM '
            "costs, twice the base optimizer's. Take larger batches, train_dataloader = dict(batch_size=..., ...), or, "
            f'if only the last one of an epoch is that small, leave it out, train_dataloader = dict({self._leave_out}, '
            '...)',
            logger='current',
            level=logging.WARNING,
        )

    def _weigh(self) -> None:
        """Have the loss modules of both passes scale, or weight, their samples."""
        record, draw = self.record(), self._draw
        assert draw is not None
        record.full_size = draw.size
        if self.reweight:
            record.weights = to_device(draw.weights.astype(np.float32), self.device)

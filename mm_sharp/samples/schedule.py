"""How AUSAM's draws change over a training, and where in the training a step is.

The code of AUSAM's first author (github.com/ajiaaa/AUSAM, commit 13ee7bf) measures every sample in a first epoch of
whole batches. Then it raises ``s_max`` from ``s_min``, with which a draw is uniform, over the first 30 of 200 epochs::

    s_max(epoch) = s_min + (s_max - s_min) * min(1, epoch / (ramp * epochs))        epochs counted from 0, ramp = 0.15

The ramp goes by epochs, as theirs does. In iteration-based training an epoch is one pass over the data set's batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm_sharp.errors import UserError, check_bool, check_choice, check_number


@dataclass(frozen=True)
class TrainingPlace:
    """Where in a training a step is."""

    share: float  # of the training that was done when the step's epoch began, in [0, 1]
    in_first_epoch: bool


# A step of a training whose length is not known: the scores' range is what it is after the ramp.
AFTER_RAMP = TrainingPlace(1.0, False)


@dataclass(frozen=True)
class TrainingLength:
    """How long a training is."""

    epochs: float  # > 0, not necessarily whole; iterations where ``epoch_length`` is None
    epoch_length: int | None  # iterations of an epoch, >= 1; None where the data set has no end

    def place(self, epoch: int, position: int = 0) -> TrainingPlace:
        """The place of an iteration, given its epoch and its number within it, both from 0.

        The iterations of an endless epoch may be counted on: ``place(0, n)`` is in epoch ``n // epoch_length``. Without
        an ``epoch_length`` the iteration alone counts, and there is no first epoch.
        """
        if self.epoch_length is None:
            return TrainingPlace(min(1.0, position / self.epochs), False)
        epoch += position // self.epoch_length
        return TrainingPlace(min(1.0, epoch / self.epochs), epoch == 0)


class Unset(float):
    """A default of an argument that can be told from the same number written in a config."""


@dataclass(frozen=True)
class Schedule:
    """What AUSAM draws over a training."""

    sampling_ratio: float  # share of each mini-batch that is drawn, in (0, 1]
    s_min: float  # normalised score of the smallest
    s_max: float  # normalised score of the largest, at the end of the ramp
    ramp: float = 0.0  # share of the training over which ``s_max`` rises from ``s_min``, in [0, 1]; 0: it is constant
    whole_first_epoch: bool = False  # whether the batches of the first epoch are used whole
    draw: str = 'systematic'  # how: see :mod:`mm_sharp.samples.selection`

    def s_max_at(self, place: TrainingPlace) -> float:
        """Normalised score of the largest in a step."""
        if place.share >= self.ramp:
            return self.s_max
        return self.s_min + (self.s_max - self.s_min) * (place.share / self.ramp)

    def ratio_at(self, place: TrainingPlace) -> float:
        """Share of the mini-batch that is drawn in a step."""
        return 1.0 if self.whole_first_epoch and place.in_first_epoch else self.sampling_ratio


# By name: the authors', and what this package did before it had theirs.
SCHEDULES = {
    'authors': Schedule(0.5, 0.1, 0.5, ramp=0.15, whole_first_epoch=True, draw='sequential'),
    'constant': Schedule(0.6, 0.3, 1.0),
}
# What the arguments of the draws may be.
CHOICES = {
    'prefer': ('large', 'small'),
    'draw': ('sequential', 'systematic', 'uniform'),
    'schedule': tuple(SCHEDULES),
}
_NUMBERS: dict[str, dict[str, Any]] = {
    'sampling_ratio': dict(high=1.0, low_open=True, example='0.5'),
    's_min': dict(low_open=True, example='0.1'),
    's_max': dict(low_open=True, example='0.5'),
    'ramp': dict(high=1.0, example='0.15'),
    'clip_quantile': dict(high=1.0, low_open=True, example='0.9'),
}
_RANGE = ('s_min', 's_max')
_NEWER = ('schedule', 'ramp', 'whole_first_epoch')
# What a uniform draw has no use for, with the values that say nothing.
_OF_SCORES = {**dict.fromkeys((*_RANGE, 'schedule', 'ramp', 'history_momentum')), 'prefer': 'large', 'clip_quantile': 1}


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """The schedule that a wrapper's arguments, by name, ask for.

    Those that are missing, None or :class:`Unset` were not given: they are the named schedule's, but for the draw with
    ``reweight``, which needs exact probabilities. ``draw='uniform'`` has no scores, and so neither a range nor a reason
    for whole batches.
    """
    given, base = _given(settings), SCHEDULES[schedule_name(settings)]
    if given.get('draw') == 'uniform':
        base = Schedule(SCHEDULES['authors'].sampling_ratio, 1.0, 1.0)
    elif given.get('reweight'):
        base = replace(base, draw='systematic')
    return replace(base, **{name: type(usual)(given[name]) for name, usual in vars(base).items() if name in given})


def schedule_name(settings: Mapping[str, Any]) -> str:
    """The name of the schedule that a wrapper's arguments ask for.

    Without a name it is ``'authors'``, but for configs of before there was one: those that give ``s_min`` or ``s_max``
    and nothing that is newer keep ``'constant'``. (The authors' own range, written out, is the authors'.)
    """
    given, authors = _given(settings), vars(SCHEDULES['authors'])
    if any(name in given for name in _NEWER):
        return str(given.get('schedule', 'authors'))
    written = {name: given[name] for name in _RANGE if name in given}
    return 'authors' if written in ({}, {name: authors[name] for name in _RANGE}) else 'constant'


def checked_schedule(owner: str, settings: Mapping[str, Any]) -> Schedule:
    """:func:`schedule_of` all arguments of ``owner``; a ValueError if one is out of range, or contradicts another."""
    for name, limits in _NUMBERS.items():
        check_number(owner, name, settings[name], **limits)
    for name, choices in CHOICES.items():
        check_choice(owner, name, settings[name], choices if name == 'prefer' else (*choices, None))
    check_bool(owner, 'reweight', settings['reweight'])
    if settings['whole_first_epoch'] is not None:
        check_bool(owner, 'whole_first_epoch', settings['whole_first_epoch'])
    given = _given(settings)
    if given.get('draw') == 'uniform':
        wrong = {name: given[name] for name, usual in _OF_SCORES.items() if name in given and given[name] != usual}
        _refuse(owner, wrong, "draw='uniform' keeps no scores, so leave it out", "draw='uniform'")
    if given.get('draw') == 'sequential' and given['reweight']:
        why = "it needs exact inclusion probabilities, which draw='sequential' has no formula for"
        _refuse(owner, {'reweight': True}, why, "reweight=True, draw='systematic'")
    if given.get('schedule') == 'constant':
        wrong = {name: given[name] for name in ('ramp', 'whole_first_epoch') if given.get(name)}
        _refuse(owner, wrong, "schedule='constant' is without it", f"schedule='authors', {_written(wrong)}")
    plan = schedule_of(settings)
    if plan.s_max < plan.s_min:
        low = given.get('s_min', plan.s_min)
        why = f'it must be a finite number in [{low:g}, inf), with s_min={low!r}'
        _refuse(owner, {'s_max': plan.s_max}, why, f's_max={max(1.0, low)!r}')
    return plan


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if v is not None and not isinstance(v, Unset)}


def _written(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{name}={value!r}' for name, value in arguments.items())


def _refuse(owner: str, wrong: Mapping[str, Any], why: str, right: str) -> None:
    if wrong:
        raise UserError(
            f'{owner}: {_written(wrong)} is not allowed: {why}. Write for example: '
            f"optim_wrapper = dict(type='{owner}', {right}, ...)"
        )

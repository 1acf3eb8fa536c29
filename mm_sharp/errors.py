"""Checks of constructor arguments: every error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

# How an argument is written in a config, by what takes it.
WRAPPER = "optim_wrapper = dict(type='{owner}', {name}={example}, ...)"
HOOK = "custom_hooks = [dict(type='{owner}', {name}={example})]"
# The scale of rho that docs/scale.md recommends, and as the messages' configs have it.
RECOMMENDED_SCALE: dict[str, Any] = {'rho': 0.02, 'adaptive': 'tensor', 'perturb': 'weights'}
RECOMMENDED = ', '.join(f'{name}={value!r}' for name, value in RECOMMENDED_SCALE.items())

_CLIPPING: dict[str, Any] = {'norm': (clip_grad_norm_, 'max_norm'), 'value': (clip_grad_value_, 'clip_value')}
_CLIP_GRAD = "dict(max_norm=1.0) or dict(type='value', clip_value=0.1)"


class UsageError(Exception):
    """Something that the user can put right; its message says how."""


class UserError(ValueError):
    """A mistake in a user's files that shows only during a run; the tools print it as one line."""


class KindError(UserError, TypeError):
    """Something in a user's files is of another kind than it must be."""


class UnsupportedError(UserError, NotImplementedError):
    """A config asks for what cannot be done."""


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    example: str,
    form: str = WRAPPER,
) -> float:
    """Return ``value`` as a float; raise unless it is a finite number (no ``bool``) from ``low`` to ``high``.

    ``low_open`` and ``high_open`` refuse the limit itself. The message names ``owner``, the class that takes the
    argument ``name``, and a right value, ``example``, in the ``form`` in which a config has it.
    """
    number = float(value) if is_number(value) else math.nan  # type: ignore[arg-type]
    inside = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
    if not inside or math.isinf(number):
        right = ')' if high_open or math.isinf(high) else ']'
        allowed = f'a finite number in {"(" if low_open else "["}{low:g}, {high:g}{right}'
        raise UserError(_message(owner, name, value, allowed, example, form))
    return number


def check_bool(owner: str, name: str, value: object, form: str = WRAPPER) -> bool:
    """Return ``value``; raise unless it is True or False."""
    if not isinstance(value, bool):
        raise UserError(_message(owner, name, value, 'True or False', 'True', form))
    return value


def check_choice(owner: str, name: str, value: object, choices: Collection[object], form: str = WRAPPER) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        allowed = 'one of ' + ', '.join(repr(choice) for choice in choices)
        close = closest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else None
        raise UserError(_message(owner, name, value, allowed, repr(close or next(iter(choices))), form))


def check_positive_int(owner: str, name: str, value: object, *, example: str, form: str = WRAPPER) -> int:
    """Return ``value``; raise unless it is an integer of at least 1 (and below 2**31: torch computes with it)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise UserError(_message(owner, name, value, 'an integer of at least 1 (and below 2**31)', example, form))
    return value


def check_clip_grad(owner: str, value: object) -> None:
    """Raise unless ``value`` is None or a dict that MMEngine's ``clip_grad`` and its clipping function take."""
    if value is None:
        return
    allowed = f"None or a dict of a clipping function's arguments, with type one of {tuple(_CLIPPING)}"
    if isinstance(value, Mapping) and set(value) - {'type'} and value.get('type', 'norm') in tuple(_CLIPPING):
        clip, limit = _CLIPPING[value.get('type', 'norm')]
        try:
            signature(clip).bind([], **{str(key): item for key, item in value.items() if key != 'type'})
            most, order = value[limit], value.get('norm_type', 2.0)
            switches = [value.get('foreach') or False, value.get('error_if_nonfinite', False)]
            # torch compares the limit with numbers of 32 bits.
            ok = is_number(most) and (0 < most <= 3e38 or most == math.inf)
            if ok and (order == 'inf' or (is_number(order) and order > 0)) and {*map(type, switches)} == {bool}:
                return
            allowed = f"a dict with {limit} above 0 (at most 3e38, or inf), norm_type above 0 or 'inf', and switches"
        except TypeError as error:
            allowed = f'the arguments of torch.nn.utils.{clip.__name__} ({error})'
    raise UserError(_message(owner, 'clip_grad', value, allowed, _CLIP_GRAD, WRAPPER))


def check_optimizer(owner: str, optimizer: Optimizer) -> None:
    """Refuse what is no optimizer, and optimizers whose ``step`` needs a closure, which compute the loss repeatedly."""
    if not isinstance(optimizer, Optimizer):
        allowed, example = 'an optimizer of torch (in a config, its dict)', "dict(type='SGD', lr=0.01, momentum=0.9)"
        shown = optimizer if isinstance(optimizer, (Mapping, str)) else type(optimizer).__name__
        raise UserError(_message(owner, 'optimizer', shown, allowed, example, WRAPPER))
    closure = signature(type(optimizer).step).parameters.get('closure')
    if closure is not None and closure.default is closure.empty:
        name = type(optimizer).__name__
        raise UnsupportedError(
            f'{owner}: optimizer={name} is not allowed: it evaluates the loss several times in one step (closure), and '
            f"MMEngine's optimizer wrappers do so once. Write for example: optim_wrapper = dict(type='{owner}', "
            "optimizer=dict(type='SGD', lr=0.01, momentum=0.9), ...)"
        )


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold: infinite ones are, nan and ``bool`` are not."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def _message(owner: str, name: str, value: object, allowed: str, example: str, form: str) -> str:
    written = form.format(owner=owner, name=name, example=example)
    return f'{owner}: {name}={value!r} is not allowed: it must be {allowed}. Write for example: {written}'


def some(keys: Iterable[str], count: int = 4) -> str:
    """The first of ``keys``, and how many more there are."""
    keys = [' '.join(key.split()) for key in keys]
    return ', '.join(keys[:count]) + (f' and {len(keys) - count} more' if len(keys) > count else '')


def in_folder(path: str | Path) -> str:
    """Where a relative path was looked for, as the end of a message that names it."""
    return '' if Path(path).is_absolute() else f' in {Path.cwd()}'


def arguments_of(cls: type) -> dict[str, Parameter]:
    """The named arguments of a constructor, and those that its ``**kwargs`` hand on to base classes."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__[:-1]:
        if '__init__' not in vars(base):
            continue
        parameters = dict(list(signature(base.__init__).parameters.items())[1:])  # type: ignore[misc]
        plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        found = {**plain, **found}
        if len(plain) == len(parameters):
            break
    return found


def check_arguments(cls: type, given: Mapping[str, object], others: Iterable[type] = ()) -> None:
    """Refuse arguments that a wrapper's class does not take, and say what was meant, for which of the ``others``."""
    known = arguments_of(cls)
    wrong = {name: value for name, value in given.items() if name not in known}
    if not wrong:
        return
    form, (first, value) = "optim_wrapper = dict(type='{}', {}, ...)", next(iter(wrong.items()))
    written, close = ', '.join(f'{name}={value!r}' for name, value in wrong.items()), closest(first, known)
    owners = [other for other in others if wrong.keys() <= arguments_of(other).keys()]
    if owners:
        owner = min((other.__name__ for other in owners), key=len)  # what others are named after is the plainest
        hint = f'{owner} has. Take it out, or write {form.format(owner, written)}'
    else:
        right = f'write {form.format(cls.__name__, f"{close}={value!r}")}' if close else 'take it out'
        hint = f'{did_you_mean(first, known)}. For example, {right}'
    raise UserError(f'{cls.__name__}: {written} is not allowed: it has no such argument, {hint}')


def closest(name: object, names: Iterable[str]) -> str | None:
    """The name that was meant, if that can be guessed; capitals do not count."""
    lower = {other.lower(): other for other in names}
    found = get_close_matches(str(name).lower(), lower, n=1)
    return lower[found[0]] if found else None


def did_you_mean(name: object, names: Collection[str]) -> str:
    """The name that was meant, if that can be guessed, and all that there are."""
    close = closest(name, names)
    return (f'did you mean {close!r}? ' if close else '') + f'there are {", ".join(sorted(names))}'

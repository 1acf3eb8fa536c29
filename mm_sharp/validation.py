"""Checks of constructor arguments: every error names the argument, its value and what is allowed (ours)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


class UserError(ValueError):
    """A mistake in a user's files that shows only while a run is under way; the tools print it as one line."""


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
) -> float:
    """Return ``value`` as a float, or raise.

    Args:
        owner: Class that takes the argument, for the message.
        name: The argument's name.
        value: What the user gave.
        low: Smallest allowed value.
        high: Largest allowed value.
        low_open: Whether ``low`` itself is refused.
        high_open: Whether ``high`` itself is refused.
        example: A right value, as it is written in a config.

    Raises:
        ValueError: ``value`` is not a finite number (``bool`` counts as none) within the range.
    """
    left = '(' if low_open else '['
    allowed = f'a finite number in {left}{low:g}, {high:g}{")" if high_open or math.isinf(high) else "]"}'
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if ok:
        assert isinstance(value, (int, float))
        ok = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if not ok:
        raise ValueError(_message(owner, name, value, allowed, example))
    return float(value)  # type: ignore[arg-type]


def check_bool(owner: str, name: str, value: object) -> bool:
    """Return ``value``, or raise.

    Raises:
        ValueError: ``value`` is neither ``True`` nor ``False``.
    """
    if not isinstance(value, bool):
        raise ValueError(_message(owner, name, value, 'True or False', 'True'))
    return value


def check_choice(owner: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        ValueError: It is not.
    """
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        allowed = 'one of ' + ', '.join(repr(choice) for choice in choices)
        raise ValueError(_message(owner, name, value, allowed, repr(next(iter(choices)))))


def check_positive_int(owner: str, name: str, value: object, *, example: str) -> int:
    """Return ``value``, or raise.

    Raises:
        ValueError: ``value`` is not an integer of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(_message(owner, name, value, 'an integer of at least 1', example))
    return value


def check_clip_grad(owner: str, value: object) -> None:
    """Raise unless ``value`` has the form that MMEngine's ``clip_grad`` has.

    Raises:
        ValueError: It is neither None nor a dict with an argument for the clipping function.
    """
    kinds = ('norm', 'value')
    if value is None:
        return
    if not isinstance(value, Mapping) or not set(value) - {'type'} or value.get('type', 'norm') not in kinds:
        allowed = f"None or a dict of a clipping function's arguments, with type one of {kinds}"
        raise ValueError(_message(owner, 'clip_grad', value, allowed, 'dict(max_norm=1.0)'))


def _message(owner: str, name: str, value: object, allowed: str, example: str) -> str:
    return (
        f'{owner}: {name}={value!r} is not allowed: it must be {allowed}. '
        f"Write for example: optim_wrapper = dict(type='{owner}', {name}={example}, ...)"
    )

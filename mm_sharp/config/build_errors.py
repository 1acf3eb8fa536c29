"""What is wrong with a part of a config that cannot be built, by its key.

Two mistakes account for most: a ``type`` that is not registered, and arguments that its class does not take. MMEngine
raises a KeyError or a TypeError for them. Then the config is searched for such a mistake. Where it has none that the
error speaks of, the error is a bug, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry

from mm_sharp.errors import UsageError, arguments_of, closest, did_you_mean


@contextmanager
def friendly_build_errors(cfg: Config) -> Iterator[None]:
    """Within, ``cfg`` is built and used; an error that :func:`explain` explains becomes a UsageError."""
    try:
        yield
    except (KeyError, TypeError) as error:
        message = explain(cfg, error)
        if message is None:
            raise
        raise UsageError(message) from error


def explain(cfg: Config, error: Exception) -> str | None:
    """The mistake in ``cfg`` that an error speaks of, by its key; None where the error comes from elsewhere."""
    text = str(error)
    for key, config in _typed(cfg._cfg_dict, ''):
        name = type_name(config['type'])
        kinds = [kind for registry in _registries() for kind in [registry.module_dict.get(name)] if kind is not None]
        if isinstance(error, KeyError) and not kinds and name in text:
            return not_registered(
                f'{key}.type', name, {one for registry in _registries() for one in registry.module_dict}
            )
        takes = {n: p for kind in kinds if isinstance(kind, type) for n, p in arguments_of(kind).items()}
        for argument in config:
            if argument not in {*takes, 'type', '_scope_'} and f"'{argument}'" in text:
                hint = f'; {did_you_mean(argument, takes)}' if takes else ''
                written = f'{key} = dict(type={name!r}, …)'
                return f'{key}.{argument}: {name} has no such argument{hint}. Take it out of {written}'
        for argument, parameter in takes.items():
            if parameter.default is parameter.empty and argument not in config and f"'{argument}'" in text:
                written = f'{key} = dict(type={name!r}, {argument}=…)'
                return f'{key}: {name} needs {argument!r}. Write for example: {written}'
    return None


def not_registered(key: str, name: str, names: Collection[str]) -> str:
    """What to do about the ``type`` at a key; MMPose registers so many that a list of them would hide the rest."""
    close = closest(name, names)
    listed = f'there are {", ".join(sorted(names))}. Else ' if len(names) < 40 else ''
    hint = f'did you mean {close!r}? Else ' if close else listed
    imports = "custom_imports = dict(imports=['my_module'])"
    return f'{key}: {name!r} is not registered; {hint}import the module that registers it: {imports}'


def type_name(kind: Any) -> str:
    """A ``type`` as the name that it is registered by."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _typed(config: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted key and content of every dict with a ``type``."""
    if isinstance(config, Mapping):
        if config.get('type') is not None:
            yield key, config
        items = [(str(name), value) for name, value in config.items()]
    else:
        items = [(str(i), value) for i, value in enumerate(config)] if isinstance(config, (list, tuple)) else []
    for name, value in items:
        yield from _typed(value, f'{key}.{name}' if key else name)


def _registries() -> list[Registry]:
    """MMEngine's registries and those of other packages below them."""
    roots = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]
    return [*roots, *(child for root in roots for child in root.children.values())]

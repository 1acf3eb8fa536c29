"""What is wrong with a part of a config that cannot be built, by its key.

MMEngine raises a KeyError for a ``type`` that is not registered and a TypeError for arguments that its class does not
take. Then the config is searched for such a mistake. Where it has none, the error is a bug, and keeps its traceback.
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
    roots = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]
    registries = [*roots, *(child for root in roots for child in root.children.values())]
    for key, config in _typed(cfg._cfg_dict, ''):
        name = type_name(config['type'])
        kinds = [registry.module_dict[name] for registry in registries if name in registry.module_dict]
        if isinstance(error, KeyError) and not kinds and f'{name} is not in' in text:
            return not_registered(f'{key}.type', name, {one for registry in registries for one in registry.module_dict})
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
    items: Any = enumerate(config) if isinstance(config, (list, tuple)) else ()
    if isinstance(config, Mapping):
        items = config.items()
        if config.get('type') is not None:
            yield key, config
    for name, value in items:
        yield from _typed(value, f'{key}.{name}' if key else str(name))

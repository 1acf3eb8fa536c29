"""What MMEngine says in a traceback when a part of a config cannot be built, with the config's key (ours).

Two mistakes account for most: a ``type`` that is not registered, and arguments that its class does not take. Both are
explained only where the config has them: an error of the same kind that comes from somewhere else is a bug, and keeps
its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry

from mm_sharp.config.wrapper_checks import arguments_of, closest, did_you_mean
from mm_sharp.errors import UsageError

_NOT_REGISTERED = re.compile(r'(\S+) is not in the \S+::(.+?) registry')
_UNKNOWN = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"(\w+)\.__init__\(\) missing \d+ required (?:positional|keyword-only) arguments?: '(\w+)'")


@contextmanager
def friendly_build_errors(cfg: Config) -> Iterator[None]:
    """A context in which ``cfg`` is built and used.

    Raises:
        UsageError: In place of an error that :func:`explain` explains.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        message = explain(cfg, error)
        if message is None:
            raise
        raise UsageError(message) from error


def explain(cfg: Config, error: Exception) -> str | None:
    """What is wrong in ``cfg``, by its key; None where the error does not come from there."""
    places = list(_typed(cfg._cfg_dict, ''))
    text = str(error)
    if found := _NOT_REGISTERED.search(text):
        name = found[1].strip('"\'')
        return _not_registered(name, found[2], [key for key, config in places if config['type'] == name])
    if found := _UNKNOWN.search(text):
        return _unknown(found[1], found[2], [(key, c) for key, c in places if found[2] in c])
    if found := _MISSING.search(text):
        kind, argument = found.groups()
        for key, config in places:
            if _name(config['type']) == kind and argument not in config:
                return f'{key}: {kind} needs {argument!r}. Write for example: {key} = dict(type={kind!r}, {argument}=…)'
    return None


def _not_registered(name: str, registry: str, keys: list[str]) -> str | None:
    if not keys:
        return None
    known = {found for place in _registries() if place.name == registry for found in _names(place)}
    # MMPose registers a hundred models: a list of them would hide the rest.
    close = closest(name, known)
    hint = (
        f'did you mean {close!r}? Else'
        if close
        else f'there are {", ".join(sorted(known))};'
        if len(known) < 40
        else ''
    )
    imports = "import the module that registers it: custom_imports = dict(imports=['my_module'])"
    return f'{keys[0]}.type: no {registry} {name!r}; {hint} {imports}'


def _unknown(kind: str, argument: str, places: list[tuple[str, Mapping[str, Any]]]) -> str | None:
    named = [place for place in places if _name(place[1]['type']) == kind]
    if not named and len(places) != 1:
        return None
    key, config = (named or places)[0]
    classes = [c for place in _registries() for c in [_class(place, config['type'])] if c is not None]
    own = {name for cls in classes for name in arguments_of(cls)} if classes else set()
    hint = f'; {did_you_mean(argument, own)}' if own else ''
    name = _name(config['type'])
    return f'{key}.{argument}: {name} has no such argument{hint}. Take it out of {key} = dict(type={name!r}, …)'


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


def _name(kind: Any) -> str:
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))).rpartition('.')[2]


def _registries() -> list[Registry]:
    return [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]


def _names(registry: Registry) -> set[str]:
    children = (_names(child) for child in registry.children.values())
    return {*registry.module_dict, *(name for names in children for name in names)}


def _class(registry: Registry, kind: Any) -> type | None:
    if isinstance(kind, type):
        return kind
    for place in (registry, *registry.children.values()):
        found = place.module_dict.get(_name(kind))
        if isinstance(found, type):
            return found
    return None

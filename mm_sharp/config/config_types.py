"""Values of a config, read without building what new-style configs import lazily (ours)."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject


def written(cfg: Config, key: str) -> Any:
    """A top-level value as it is written; None where there is none."""
    return dict.get(cfg._cfg_dict, key)


def unbuilt(config: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy, in which imports of new-style configs stay what they are: a built one cannot be written out."""
    return dict(dict.items(config))


def type_name(config: dict[str, Any], key: str) -> str:
    """A ``type`` (or the like) as text: in new-style configs it is an import that was not made yet, or a class."""
    kind = unbuilt(config).get(key)
    if isinstance(kind, (LazyAttr, LazyObject)):
        return f'{kind.module}.{kind}'
    return f'{kind.__module__}.{kind.__qualname__}' if isinstance(kind, type) else str(kind)


def is_type(config: dict[str, Any], name: str, key: str = 'type', *, absent: bool = False) -> bool:
    """Whether a config's ``type`` is one of MMEngine's or ours of this name, written as text or imported."""
    if unbuilt(config).get(key) is None:
        return absent
    package, _, last = type_name(config, key).rpartition('.')
    return last == name and package.split('.')[0] in ('', 'mmengine', 'mm_sharp')

"""What the tools share. Names of before version 0.2, when this was one module, are found in :mod:`options` for now."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    options = importlib.import_module('mm_sharp.cli.options')
    if name.startswith('_') or not hasattr(options, name):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    message = f'mm_sharp.cli.{name} has moved to mm_sharp.cli.options; the old name will be gone in the next release'
    warnings.warn(message, FutureWarning, stacklevel=2)
    return getattr(options, name)

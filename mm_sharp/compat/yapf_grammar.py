"""``import mmengine`` in several processes at once.

Cause: MMEngine imports yapf, which keeps its grammars as pickles in the user's cache folder. yapf 0.43.0 renames such a
file to its name before all of it is written (google/yapf#1204). Of several processes that start together on a new
machine, as the ranks of a training do, one reads a torn file and dies with ``EOFError: Ran out of input``. A process
that is killed at that moment leaves a torn file for good.

Fix: a grammar whose pickle cannot be read is made again from its text. A program that imports MMEngine before mm_sharp
does so without the fix.
"""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

from .fix import Fix

# What pickle raises of a torn file, by where it is torn.
_TORN = (EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, ValueError)


def tolerant(load_grammar: Callable[..., Any]) -> Callable[..., Any]:
    """yapf's ``load_grammar``, which reads the cache unless ``force`` is set, made to do without a torn cache."""

    @functools.wraps(load_grammar)
    def load(gt: str, **options: Any) -> Any:
        try:
            return load_grammar(gt, **options)
        except _TORN:
            return load_grammar(gt, **{**options, 'force': True})

    return load


def _patch(module: str) -> str:
    driver: Any = importlib.import_module('yapf_third_party._ylib2to3.pgen2.driver')
    driver.load_grammar = tolerant(driver.load_grammar)
    return 'processes that start together read a cache that is only half written'


FIX = Fix(
    name='yapf grammars',
    patch=_patch,
    ends_with='a yapf that flushes its cache before it renames it (none as of 0.43.0)',
    before=('yapf_third_party._ylib2to3.pygram',),  # reads the grammars when it is imported
)
FIX.install()  # before ``mm_sharp.compat`` imports MMEngine

"""``import mmengine`` in several processes at once, which yapf's cache of its grammars can end.

Cause: MMEngine imports yapf, which keeps its grammars as pickles in the user's cache folder. yapf 0.43.0 renames such a
file to its name before all of it is written (google/yapf#1204), so that of several processes that start together on a
new machine, the ranks of a distributed training say, one reads a torn file and dies with ``EOFError: Ran out of
input``. A process that is killed at that moment leaves a torn file for good.

Repair: a grammar whose pickle cannot be read is made again from its text, as if there were no cache. It is in place
before this package imports MMEngine; a program that imports MMEngine first does so without it.

Ends with: a yapf that flushes the file before it renames it (none as of 0.43.0).
"""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'yapf grammars'
_ENDS = 'a yapf that flushes its cache before it renames it (none as of 0.43.0)'
_READER = 'yapf_third_party._ylib2to3.pygram'
# What pickle raises of a torn file, by where it is torn.
_TORN = (EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, ValueError, UnicodeDecodeError)
_active = False


def install() -> None:
    """Arrange for the repair to run just before yapf reads its grammars."""
    before_import(_READER, _repair)


def describe() -> Fix:
    """Whether yapf's reader of grammars was wrapped."""
    if _active:
        return Fix(_NAME, True, 'processes that start together read a cache that is only half written', _ENDS)
    if not is_present('yapf'):
        return Fix(_NAME, False, 'yapf is not installed', _ENDS)
    return Fix(_NAME, False, 'yapf has no such cache, or was imported before mm_sharp', _ENDS)


def _repair(name: str) -> None:
    """Wrap the function that ``pygram`` reads the grammars with."""
    global _active
    driver: Any = importlib.import_module('yapf_third_party._ylib2to3.pgen2.driver')
    if not _active:
        driver.load_grammar = tolerant(driver.load_grammar)
        _active = True


def tolerant(load_grammar: Callable[..., Any]) -> Callable[..., Any]:
    """``load_grammar``, that makes the grammar anew where its cache cannot be read.

    Args:
        load_grammar: yapf's ``load_grammar(gt, …)``, which reads the cache unless ``force`` is set.
    """

    @functools.wraps(load_grammar)
    def load(gt: str, **options: Any) -> Any:
        try:
            return load_grammar(gt, **options)
        except _TORN:
            return load_grammar(gt, **{**options, 'force': True})

    return load


install()  # ``mm_sharp.compat`` has no time to lose: see there

"""``import mmengine`` in several processes at once.

MMEngine imports yapf, which keeps its grammars as pickles in a cache. yapf 0.43.0 renames such a file before all of it
is written (google/yapf#1204), so that ranks that start together, or any after one was killed, may read a torn one. A
grammar whose pickle cannot be read is made again from its text, where mm_sharp is imported before MMEngine.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from .fix import Fix

_READER = 'yapf_third_party._ylib2to3.pygram'  # reads the grammars when it is imported
# What pickle raises of a torn file, by where it is torn.
_TORN = (EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, ValueError)


def tolerant(load_grammar: Callable[..., Any]) -> Callable[..., Any]:
    """yapf's ``load_grammar``, which reads the cache unless ``force`` is set, made to do without a torn cache."""

    @wraps(load_grammar)
    def load(gt: str, **options: Any) -> Any:
        try:
            return load_grammar(gt, **options)
        except _TORN:
            return load_grammar(gt, **{**options, 'force': True})

    return load


@partial(Fix, 'yapf grammars', 'a yapf that flushes its cache first (none as of 0.43.0)', before=(_READER,))
def fix_grammars(module: str) -> str:
    driver: Any = importlib.import_module('yapf_third_party._ylib2to3.pgen2.driver')
    driver.load_grammar = tolerant(driver.load_grammar)
    return 'processes that start together read a cache that is only half written'


fix_grammars.install()  # before ``mm_sharp.compat`` imports MMEngine

"""Run a repair at the moment a module is imported, and not before (ours).

``import mm_sharp`` must stay cheap and must work where MMPose, MMCV or torchvision are absent. So a
repair doesn't import what it repairs: it is put in front of ``sys.meta_path`` under a module's name and
runs when that module is looked for. A repair either prepares the ground and returns None, which lets the
normal import go on, or returns the spec of a stand-in module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Repair = Callable[[str], ModuleSpec | None]


class RepairFinder(MetaPathFinder):
    """A finder that knows only the names it was given.

    A name stays registered after its import, because an import that fails may be tried again; repairs
    are therefore written so that running them twice does no harm.
    """

    def __init__(self) -> None:
        self.repairs: dict[str, Repair] = {}
        self._paused: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the repair for ``fullname`` returns; None for every other name."""
        repair = self.repairs.get(fullname)
        if repair is None or fullname in self._paused:
            return None
        with self.pause(fullname):
            return repair(fullname)

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Inside, ``name`` is looked for as if this finder were not there."""
        self._paused.add(name)
        try:
            yield
        finally:
            self._paused.discard(name)


FINDER = RepairFinder()


def before_import(name: str, repair: Repair) -> None:
    """Run ``repair(name)`` whenever the module ``name`` is about to be imported.

    Does nothing for a module that is already there: if it was imported, it works.

    Args:
        name: full name of the module.
        repair: called with ``name``; returns None to let the import go on, or the spec of a stand-in.
    """
    if name in sys.modules:
        return
    FINDER.repairs[name] = repair
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def is_present(name: str) -> bool:
    """Whether ``name`` can be found without our help. Imports its parent packages, not itself."""
    with FINDER.pause(name):
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # the parent is missing, or a module without a spec
            return False

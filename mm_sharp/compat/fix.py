"""How a fix of the stack is declared, and when it runs.

``import mm_sharp`` must stay cheap, and must work where MMPose, MMCV or torchvision are absent. So a fix does not
import what it repairs: it runs when that is imported. For MMEngine, which we need anyway, it runs at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@dataclass
class Fix:
    """One repair of the stack, and its state in this process.

    Attributes:
        name: what it repairs, in two or three words.
        package: the package in which something is missing or broken.
        patch: patches what is broken, and returns what that was; None if nothing is. Its argument is the module that is
            about to be imported. It may be called again until it has patched something.
        ends_with: the version that makes it unnecessary.
        before: modules before whose import ``patch`` is called; if none, it is called when mm_sharp is imported.
        stand_in: loads modules in place of those in ``before`` once ``patch`` has found them broken.
        active: whether anything was patched.
        found: what ``patch`` found to be broken.
    """

    name: str
    package: str
    patch: Callable[[str], str | None]
    ends_with: str
    before: Sequence[str] = ()
    stand_in: Loader | None = None
    active: bool = False
    found: str | None = None

    @property
    def reason(self) -> str:
        """Why it is active, or why it is not needed."""
        if self.found is not None:
            return self.found
        if not is_present(self.package):
            return f'{self.package} is not installed'
        imported = not self.before or any(name in sys.modules for name in self.before)
        return f'{self.package} needs no fix' if imported else f'{self.before[0]} was not imported'

    def install(self) -> None:
        """Have it run when it is time; a second call changes nothing."""
        if not self.before:
            self.run(self.package)
        for name in self.before:
            if name not in sys.modules:  # what was imported works
                FINDER.fixes[name] = self
        if FINDER not in sys.meta_path:
            sys.meta_path.insert(0, FINDER)

    def run(self, module: str) -> ModuleSpec | None:
        """Patch what is broken; returns the spec of a stand-in for ``module`` if there is one."""
        if not self.active:
            try:
                self.found = self.patch(module)
            except ImportError as error:
                self.found = str(error)
                raise
            self.active = self.found is not None
        if not self.active or self.stand_in is None:
            return None
        return ModuleSpec(module, self.stand_in, is_package='.' not in module)


class FixFinder(MetaPathFinder):
    """Runs a fix when a module that it waits for is looked for."""

    def __init__(self) -> None:
        self.fixes: dict[str, Fix] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :meth:`importlib.abc.MetaPathFinder.find_spec`; None lets the import go on as ever."""
        fix = self.fixes.pop(fullname, None)  # away while it runs, since it may look for the module itself
        if fix is None:
            return None
        try:
            return fix.run(fullname)
        finally:
            self.fixes[fullname] = fix


FINDER = FixFinder()


def is_present(name: str) -> bool:
    """Whether the module ``name`` can be found without our help. Imports its parent packages, not itself."""
    waiting = {key: FINDER.fixes.pop(key) for key in (name,) if key in FINDER.fixes}
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # the parent is missing, or a module without a spec
        return False
    finally:
        FINDER.fixes.update(waiting)

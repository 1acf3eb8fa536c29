"""How a fix of the stack is declared, by ``@partial(Fix, name, ends_with)`` on its ``patch``, and when it runs.

``import mm_sharp`` must stay cheap, and must work where MMPose, MMCV or torchvision are absent. So a fix runs when what
it repairs is imported; for MMEngine, which we need anyway, at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_looked_for: set[str] = set()  # modules that no fix is to run for at the moment


@dataclass(eq=False)
class Fix(MetaPathFinder):
    """One repair of the stack, and its state in this process."""

    name: str  # what it repairs, in two or three words
    ends_with: str  # the version that makes it unnecessary
    # Patches what the module that is about to be imported finds broken, and returns what that was; None if nothing is,
    # and then it may be called again.
    patch: Callable[[str], str | None]
    before: Sequence[str] = ()  # modules before whose import it patches; if none, when mm_sharp is imported
    stand_in: Loader | None = None  # loads these once they were found to be broken
    active: bool = False  # whether anything was patched
    found: str | None = None  # what was broken

    @property
    def reason(self) -> str:
        """Why it is active, or why it is not needed."""
        if self.found is not None:
            return self.found
        package = self.before[0].partition('.')[0] if self.before else 'mmengine'
        if not is_present(package):
            return f'{package} is not installed'
        imported = not self.before or any(name in sys.modules for name in self.before)
        return f'{package} needs no fix' if imported else f'{self.before[0]} was not imported'

    def install(self) -> None:
        """Have it run when it is time; a second call changes nothing."""
        if not self.before:
            self.run('mmengine')
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def run(self, module: str) -> None:
        """Patch what is broken, once."""
        if self.active:
            return
        try:
            self.found = self.patch(module)
        except ImportError as error:
            self.found = str(error)
            raise
        self.active = self.found is not None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Patch what ``fullname`` needs; then its import goes on as ever, or with the stand-in."""
        if fullname not in self.before or fullname in _looked_for:
            return None
        _looked_for.add(fullname)
        try:
            self.run(fullname)
        finally:
            _looked_for.discard(fullname)
        if not self.active or self.stand_in is None:
            return None
        return ModuleSpec(fullname, self.stand_in, is_package='.' not in fullname)


def is_present(name: str) -> bool:
    """Whether the module ``name`` can be found without our help. Imports its parent packages, not itself."""
    _looked_for.add(name)
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # the parent is missing, or a module without a spec
        return False
    finally:
        _looked_for.discard(name)

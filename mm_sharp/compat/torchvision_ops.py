"""torchvision beside a CPU build of torch.

Cause: a package registry may offer torchvision only as built against a CUDA torch. Beside a CPU torch its
compiled library does not load, and then ``import torchvision`` itself fails: it registers shape functions
for ``torchvision::nms`` and ``torchvision::qnms``, two operators that this library would have defined.
MMPose imports torchvision for its transforms, which need no compiled operator.

Repair: define the two operators' schemas, and an implementation that raises, just before torchvision
registers its shape functions. By then torchvision itself has tried to load its library, so its own verdict
is used and nothing is guessed. With a CUDA torch nothing is done: there the mismatch is a real one.

What is imported before mm_sharp cannot be mended: ``import timm``, which imports torchvision, ends with torch's
``operator torchvision::nms does not exist``. So mm_sharp comes first. A program that goes on after that error and
imports mm_sharp then can import both: Python removes a module whose import failed, and its second import is mended.

Ends with: a torchvision that was built for the installed torch (a ``+cpu`` wheel beside a CPU torch).
"""

from __future__ import annotations

import sys
from typing import NoReturn

import torch

from .fix import Fix
from .import_hook import before_import, is_present

_NAME = 'torchvision operators'
_ENDS = 'a torchvision built for the installed torch'
_OPERATORS = ('nms', 'qnms')
# The first of these to be imported comes after torchvision's library was tried and before its operators
# are needed. Which one that is depends on the version.
_HOOKED = ('torchvision._autograd_registrations', 'torchvision._meta_registrations')
# A torch.library.Library takes its operators with it when it is collected, hence a reference for good.
_library: torch.library.Library | None = None


def install() -> None:
    """Arrange for the repair to run if torchvision is imported later."""
    if 'torchvision' not in sys.modules:
        for name in _HOOKED:
            before_import(name, _repair)


def describe() -> Fix:
    """Whether the operators were defined by us; torchvision should have been imported before."""
    if _library is not None:
        reason = (
            f"torch {torch.__version__} has no CUDA and torchvision's compiled operators don't load; "
            'torchvision imports, calling nms raises. Import mm_sharp before torchvision, timm, mmpretrain and mmpose: '
            "without it their import ends with 'operator torchvision::nms does not exist'"
        )
        return Fix(_NAME, True, reason, _ENDS)
    if not is_present('torchvision'):
        return Fix(_NAME, False, 'torchvision is not installed', _ENDS)
    if 'torchvision' not in sys.modules:
        return Fix(_NAME, False, 'torchvision was not imported', _ENDS)
    return Fix(_NAME, False, "torchvision's own operators load", _ENDS)


def _repair(name: str) -> None:
    """Define the missing operators where torchvision found none and torch has no GPU build."""
    global _library
    extension = sys.modules.get('torchvision.extension')
    if _library is not None or extension is None or extension._has_ops():
        return
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            library.impl(operator, _raiser(operator), 'CPU')
    _library = library


def _raiser(operator: str):  # type: ignore[no-untyped-def]  # torch inspects the signature
    def missing(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> NoReturn:
        raise RuntimeError(
            f"torchvision::{operator} is compiled code, and the installed torchvision's does not load "
            f'beside torch {torch.__version__}. Install the torchvision wheel that was built for this torch.'
        )

    return missing

"""torchvision beside a CPU build of torch.

Cause: a package registry may offer torchvision only as built against a CUDA torch. Beside a CPU torch its compiled
library does not load, and ``import torchvision`` fails, since it registers shape functions for two operators of that
library. MMPose imports torchvision for its transforms, which need no compiled operator.

Fix: the two operators' schemas, with an implementation that raises, are defined just before torchvision registers its
shape functions. By then torchvision has tried to load its library. With a CUDA torch nothing is done: there the
mismatch is a real one.

What is imported before mm_sharp cannot be patched: ``import timm``, which imports torchvision, ends with torch's
``operator torchvision::nms does not exist``. Python removes a module whose import failed, so it can be imported again
once mm_sharp has been.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import torch

from .fix import Fix

_OPERATORS = ('nms', 'qnms')
# A torch.library.Library takes its operators with it when it is collected, hence a reference for good.
_library: torch.library.Library | None = None


def _patch(module: str) -> str | None:
    global _library
    extension = sys.modules.get('torchvision.extension')
    if extension is None or extension._has_ops() or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    _library = torch.library.Library('torchvision', 'FRAGMENT')
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            _library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            _library.impl(operator, _raiser(operator), 'CPU')
    return (
        f"torch {torch.__version__} has no CUDA and torchvision's compiled operators don't load; torchvision imports, "
        'calling nms raises. Import mm_sharp before torchvision, timm, mmpretrain and mmpose: '
        "without it their import ends with 'operator torchvision::nms does not exist'"
    )


def _raiser(operator: str):  # type: ignore[no-untyped-def]  # torch inspects the signature
    def missing(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> NoReturn:
        raise RuntimeError(
            f"torchvision::{operator} is compiled code, and the installed torchvision's does not load "
            f'beside torch {torch.__version__}. Install the torchvision wheel that was built for this torch.'
        )

    return missing


FIX = Fix(
    name='torchvision operators',
    package='torchvision',
    patch=_patch,
    ends_with='a torchvision built for the installed torch (a +cpu wheel beside a CPU torch)',
    # Which of the two is imported first, after the library was tried, depends on torchvision's version.
    before=('torchvision._autograd_registrations', 'torchvision._meta_registrations'),
)

"""The optimizer wrappers of a run: one, or several in MMEngine's ``OptimWrapperDict``."""

from __future__ import annotations

from typing import Any

from mmengine.optim import OptimWrapperDict


def optim_wrappers(optim_wrapper: Any) -> dict[str, Any]:
    """Each optimizer wrapper by its name, which is ``''`` for a single one."""
    return dict(optim_wrapper.items()) if isinstance(optim_wrapper, OptimWrapperDict) else {'': optim_wrapper}

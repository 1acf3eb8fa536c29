"""The messages of our ``tools/train.py`` under every other tool, such as MMPose's own ``tools/train.py``.

When a Runner of MMEngine's begins to train by a config that uses this package, what only the whole config shows is
checked, before MMEngine builds the optimizer and the data loader: its own errors there name no key. Constructors check
the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from torch.optim import Optimizer

from mm_sharp.compat import uses_mm_sharp
from mm_sharp.config.build_errors import friendly_build_errors
from mm_sharp.config.fragments import imports_of
from mm_sharp.config.preflight import check_sampler, check_wrappers


def install() -> None:
    """From now on configs of runs that use this package are checked; a second call changes nothing."""
    for kind in (Runner, FlexibleRunner):
        if not hasattr(kind.train, '_is_checked'):
            kind.train = _checked(kind.train)


def _checked(train: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(train)
    def wrapper(self: Any) -> Any:
        # A misspelt wrapper is nobody's: what tells is that the config imports this package.
        if not (uses_mm_sharp(self) or any(str(name).startswith('mm_sharp') for name in imports_of(self.cfg))):
            return train(self)
        with friendly_build_errors(self.cfg):
            _check(self)
            return train(self)

    wrapper._is_checked = True  # type: ignore[attr-defined]
    return wrapper


def _check(runner: Any) -> None:
    """Check what is not built yet; a UsageError says what to write."""
    optim_wrapper, loader = runner.optim_wrapper, runner._train_dataloader
    built = (Optimizer, OptimWrapper)
    if isinstance(optim_wrapper, dict) and not any(isinstance(part, built) for part in optim_wrapper.values()):
        scope = runner.cfg.get('default_scope', 'mmengine')
        check_wrappers(Config({'optim_wrapper': optim_wrapper, 'default_scope': scope}))
    if isinstance(loader, dict):
        check_sampler(loader)

"""What MMEngine's Runner sets up before it builds or runs a model, and a training data loader in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mm_sharp.config.build_errors import friendly_build_errors

# Options of a training loader that say how to load, and not what.
_DROPPED = (
    *('batch_sampler', 'drop_last', 'in_order', 'multiprocessing_context', 'num_batch_per_epoch', 'persistent_workers'),
    *('pin_memory', 'prefetch_factor', 'timeout', 'worker_init_fn'),
)


@contextmanager
def prepared(cfg: Config, epoch: int = 0) -> Iterator[None]:
    """A context with the config's default scope, and with the progress that some losses ask for.

    MMEngine's messages below a warning are left out: without a log file, it prints how each weight is initialised.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'), friendly_build_errors(cfg):
            hub = MessageHub.get_current_instance()
            hub.update_info('epoch', epoch)
            hub.update_info('iter', 0)
            yield
    finally:
        logging.disable(before)


def build_loader(cfg: Config, **changes: Any) -> Any:
    """The training data loader of a config, without workers and in the data set's order.

    Args:
        cfg: The whole config.
        changes: Options that go before the config's.
    """
    options = {key: value for key, value in cfg.train_dataloader.items() if key not in _DROPPED}
    sampler = {'type': 'DefaultSampler', 'shuffle': False}
    return Runner.build_dataloader({**options, 'num_workers': 0, 'sampler': sampler, **changes})

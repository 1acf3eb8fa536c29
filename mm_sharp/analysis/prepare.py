"""What MMEngine's Runner sets up before it builds or runs a model, and a training data loader in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, set_random_seed

from mm_sharp.config.preflight import friendly_build_errors
from mm_sharp.ops.rng import RandomState

# Options of a training loader that say what to load; the others say how.
_KEPT = ('batch_size', 'collate_fn', 'dataset')


@contextmanager
def prepared(cfg: Config, epoch: int = 0) -> Iterator[None]:
    """A context with the config's default scope, and with the progress that some losses ask for.

    MMEngine's messages below a warning are left out: without a log file, it prints how each weight is initialised.
    """
    before, scope = logging.root.manager.disable, cfg.get('default_scope') or 'mmengine'
    logging.disable(logging.INFO)
    try:
        with DefaultScope.overwrite_default_scope(scope), friendly_build_errors(cfg):
            MessageHub.get_current_instance().update_info_dict({'epoch': epoch, 'iter': 0})
            yield
    finally:
        logging.disable(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, random numbers are those of a seed; afterwards they go on as if none had been drawn."""
    before = RandomState.capture()
    set_random_seed(seed)
    try:
        yield
    finally:
        before.restore()


def model_config(cfg: Config, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model of a config, or another one, with the config's data preprocessor if it has none of its own."""
    own = {'data_preprocessor': cfg.data_preprocessor} if cfg.get('data_preprocessor') else {}
    return {**own, **(cfg.model if model is None else model)}


def build_loader(cfg: Config, **changes: Any) -> Any:
    """The training data loader of a config, in the data set's order; ``changes`` are options that go before its own."""
    options = {key: value for key, value in cfg.train_dataloader.items() if key in _KEPT}
    sampler = {'type': 'DefaultSampler', 'shuffle': False}
    return Runner.build_dataloader({**options, 'num_workers': 0, 'sampler': sampler, **changes})

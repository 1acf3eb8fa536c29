"""The model of a config with a checkpoint's weights (ours)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

from mm_sharp.cli.loading import careful_loading
from mm_sharp.config.build_errors import friendly_build_errors
from mm_sharp.errors import UserError
from mm_sharp.hooks.checkpoint import check_next_load


@dataclass(frozen=True)
class LoadedModel:
    """A model with the weights of a checkpoint.

    Args:
        model: On MMEngine's device.
        epoch: Epochs that it was trained for; 0 where the checkpoint does not say.
        quantized: Whether it is a quantized model.
    """

    model: nn.Module
    epoch: int
    quantized: bool


@contextmanager
def prepared(cfg: Config, epoch: int = 0) -> Iterator[None]:
    """What a Runner does before a model is built or run: default scope, and progress, which some losses ask for.

    MMEngine's remarks below a warning are left out.
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


def load_model(cfg: Config, checkpoint: str, trust: bool = False) -> LoadedModel:
    """Build the config's model and load a checkpoint, by the rules of ``tools/test.py``.

    Args:
        cfg: The whole config.
        checkpoint: The file.
        trust: Load it even if it is more than plain data.

    Raises:
        UserError: The checkpoint is not plain, damaged, or of another model; or a quantized model's scales are not in
            it.
        UsageError: The config's model cannot be built.
    """
    config = dict(cfg.model)
    if cfg.get('data_preprocessor'):
        config.setdefault('data_preprocessor', cfg.data_preprocessor)
    quantized = config.get('type') == 'QuantizedModel'
    if quantized:
        # The one package that may import Brevitas; whoever has such a config has it.
        from mm_sharp.quantization import check_calibrated
    with careful_loading(trust), prepared(cfg):
        model = revert_sync_batchnorm(MODELS.build(config))
        check_next_load(model)
        try:
            content = load_checkpoint(model, checkpoint, map_location='cpu', logger='current')
            if quantized:
                check_calibrated(model)
        except UserError as error:
            said = str(error)
            if checkpoint in said:
                raise
            raise UserError(f"cannot use the checkpoint '{checkpoint}': {said}") from error
    return LoadedModel(model.to(get_device()), _epoch(content), quantized)


def _epoch(content: Any) -> int:
    meta = content.get('meta')
    epoch = meta.get('epoch') if isinstance(meta, dict) else None
    return epoch if isinstance(epoch, int) else 0

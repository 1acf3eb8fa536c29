"""What may have made a run fail that MMEngine has begun to train: its data and its model, looked at after the error."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import BaseLoop

from mm_sharp.errors import UsageError
from mm_sharp.hooks.start import no_batch
from mm_sharp.ops.model_call import unwrap


def explain_failure(runner: Any, error: Exception) -> None:
    """Raise a UsageError from ``error`` if there is not one batch; log what does not fit if the first step failed."""
    loop = runner._train_loop
    if not isinstance(loop, BaseLoop):
        return
    if message := no_batch(loop.dataloader):
        raise UsageError(message) from error
    if not runner.iter and (hint := _keypoints_do_not_fit(unwrap(runner.model), loop.dataloader.dataset)):
        print_log(hint, logger='current', level=logging.ERROR)


def _keypoints_do_not_fit(model: Any, dataset: Any) -> str:
    """That a head is for another number of keypoints than a data set has; '' if that cannot be the matter."""
    head = getattr(model, 'head', None)
    names = (getattr(dataset, 'metainfo', None) or {}).get('keypoint_id2name') or ()
    for argument in ('out_channels', 'num_joints', 'num_keypoints'):
        count = getattr(head, argument, None)
        if names and type(count) is int and count != len(names):
            written = f'model.head.{argument}={count}'
            return f'{written}, and the training data has {len(names)} keypoints: is that what does not fit?'
    return ''

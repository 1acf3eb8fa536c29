"""The model of a config with a checkpoint's weights, and a fixed part of a data set.

The samples are the first ones of a seeded shuffle. They go through the training pipeline, which makes the labels that a
loss needs; where it augments, one random augmentation of each sample is kept, which the seed determines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm import tqdm

from mm_sharp.analysis.prepare import build_loader, model_config, prepared, seeded
from mm_sharp.cli.loading import careful_loading
from mm_sharp.errors import UsageError, UserError
from mm_sharp.hooks.checkpoint import check_next_load

SPLITS = ('train', 'val')
_SETS = {'train': 'training', 'val': 'validation'}


def load_model(
    cfg: Config, checkpoint: str, trust: bool = False, check: Callable[[nn.Module], object] | None = None
) -> tuple[nn.Module, int, bool]:
    """A config's model with a checkpoint's weights, the epochs of its training (0: unknown), whether it is quantized.

    ``trust`` is for a checkpoint that may run code; ``check`` is given the model before it is loaded. A UserError: the
    checkpoint is not plain, damaged, of another model, or of an uncalibrated quantized one.
    """
    config = model_config(cfg)
    quantized = config.get('type') == 'QuantizedModel'
    with careful_loading(trust), prepared(cfg):
        model = revert_sync_batchnorm(MODELS.build(config))
        if check is not None:
            check(model)
        check_next_load(model)
        try:
            content = load_checkpoint(model, checkpoint, map_location='cpu', logger='current')
            if quantized:
                from mm_sharp.quantization import check_calibrated

                check_calibrated(model)
        except UserError as error:
            if checkpoint in str(error):
                raise
            raise UserError(f"cannot use the checkpoint '{checkpoint}': {error}") from error
    return model.to(get_device()), (content.get('meta') or {}).get('epoch') or 0, quantized


@dataclass(frozen=True)
class Samples:
    """Samples as a data set gives them, in this process's memory."""

    rows: list[Any]
    collate: Callable[[list[Any]], Any]
    dataset: str  # its kind, and its annotation file if it has one
    split: str
    seed: int  # of the choice and of the augmentation
    available: int  # samples that the data set has
    digest: str  # of what the model is fed with, 12 hexadecimal digits: equal digests, equal samples

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[tuple[int, Any]]:
        """The samples in order, ``size`` at a time (the last batch may be smaller): how many, and the batch."""
        for rows in (self.rows[start : start + size] for start in range(0, len(self), size)):
            yield len(rows), self.collate(rows)


def load_samples(
    cfg: Config, split: str, count: int, seed: int, *, option: str = '--samples', at_most: bool = False
) -> Samples:
    """Load samples, by a seed of shuffle and augmentation.

    If there are fewer than ``count``, all of them with ``at_most``, else a UsageError, which names the tool's
    ``option`` for the count.
    """
    options = dataset_config(cfg, split)
    with seeded(seed):
        loader = build_loader(cfg, dataset=options, batch_size=1)
        dataset, collate = loader.dataset, loader.collate_fn
        if count > len(dataset) and not at_most:
            there = f'the {_SETS[split]} set has {len(dataset)} {option.removeprefix("--")} only'
            raise UsageError(f'{option} {count}: {there}: write {option} {len(dataset)}')
        chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
        rows = [dataset[int(index)] for index in tqdm(chosen, 'loading samples', leave=False, disable=None)]
    kind = options.get('type')
    name = f'{getattr(kind, "__name__", kind)} {_owner(options, "ann_file").get("ann_file") or ""}'.strip()
    return Samples(rows, collate, name, split, seed, len(dataset), _digest(rows, collate))


def dataset_config(cfg: Config, split: str) -> dict[str, Any]:
    """The config of a split's data set, with the training pipeline; a UsageError if there is no such loader."""
    for name in dict.fromkeys(('train', split)):
        if not cfg.get(f'{name}_dataloader'):
            raise UsageError(f'the config has no {name}_dataloader: there is no loss to measure on --split {split}')
    training, dataset = cfg.train_dataloader.dataset, dict(cfg[f'{split}_dataloader'].dataset)
    if split == 'val':
        # As in testing, people would be detections, or have no labels.
        changes = {'pipeline': _owner(training, 'pipeline').get('pipeline'), 'test_mode': False, 'bbox_file': None}
        dataset.update({key: value for key, value in changes.items() if key in dataset})
    return dataset


def _owner(dataset: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A data set's config, or that of the one which it wraps (repeated data sets), that has ``key``, if one has."""
    while not dataset.get(key) and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return dataset


def _digest(rows: list[Any], collate: Callable[[list[Any]], Any]) -> str:
    """Of the first tensor of each sample, which is the image (or what else the model takes in)."""
    total = hashlib.sha256()
    for row in rows:
        for tensor in [leaf for leaf in tree_flatten(collate([row]))[0] if isinstance(leaf, Tensor)][:1]:
            total.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:12]

"""A fixed part of a data set, loaded once (ours).

The samples are the first ones of a seeded shuffle. They go through the training pipeline, whose last steps make the
labels that a loss needs, so that a held-out split can be measured as well; where the pipeline augments, one random
augmentation of each sample is kept, which the seed determines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from mm_sharp.errors import UsageError
from mm_sharp.ops.rng import RandomState

SPLITS = ('train', 'val')
# Options of a training loader that say how to load, and not what.
_DROPPED = (
    *('batch_sampler', 'drop_last', 'in_order', 'multiprocessing_context', 'num_batch_per_epoch', 'persistent_workers'),
    *('pin_memory', 'prefetch_factor', 'sampler', 'timeout', 'worker_init_fn'),
)


@dataclass(frozen=True)
class Samples:
    """Samples as a data set gives them, in this process's memory.

    Args:
        rows: One for each sample.
        collate: Makes a batch of some of them.
        dataset: Kind of the data set, and its annotation file if it has one.
        split: ``'train'`` or ``'val'``.
        seed: Of the choice and of the augmentation.
        available: Samples that the data set has.
        digest: Of what the model is fed with, 12 hexadecimal digits: equal digests, equal samples.
    """

    rows: list[Any] = field(repr=False)
    collate: Callable[[list[Any]], Any] = field(repr=False)
    dataset: str
    split: str
    seed: int
    available: int
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[tuple[int, Any]]:
        """The samples in order, ``size`` at a time (the last batch may be smaller): how many, and the batch."""
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            yield len(rows), self.collate(rows)


def load_samples(cfg: Config, split: str, count: int, seed: int, tick: Callable[[], object] = lambda: None) -> Samples:
    """Load ``count`` samples of a config's data set.

    Args:
        cfg: The whole config, whose data files are there.
        split: ``'train'`` or ``'val'``.
        count: At least 1.
        seed: Of the shuffle, and of the pipeline's random augmentation.
        tick: Called after each sample.

    Raises:
        UsageError: There is no such data set in the config, or it is too small.
    """
    before = RandomState.capture()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        options = loader_options(cfg, split)
        loader = Runner.build_dataloader(
            {**options, 'batch_size': 1, 'num_workers': 0, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}}
        )
        dataset = loader.dataset
        if count > len(dataset):
            raise UsageError(f'--samples {count}: the data set ({split}) has {len(dataset)} samples only')
        rows = []
        for index in np.random.default_rng(seed).permutation(len(dataset))[:count]:
            rows.append(dataset[int(index)])
            tick()
    finally:
        before.restore()
    name = _name(options['dataset'])
    return Samples(rows, loader.collate_fn, name, split, seed, len(dataset), _digest(rows, loader.collate_fn))


def loader_options(cfg: Config, split: str) -> dict[str, Any]:
    """The config of the loader: the training loader's, with the held-out data set in it if that is asked for.

    Raises:
        UsageError: The config has no such loader.
    """
    for name in dict.fromkeys(('train', split)):
        if not cfg.get(f'{name}_dataloader'):
            raise UsageError(f'the config has no {name}_dataloader: there is no loss to measure on --split {split}')
    options = {key: value for key, value in cfg.train_dataloader.items() if key not in _DROPPED}
    if split == 'val':
        dataset = dict(cfg.val_dataloader.dataset)
        pipeline = _pipeline(cfg.train_dataloader.dataset)
        if 'pipeline' in dataset and pipeline is not None:
            dataset['pipeline'] = pipeline
        # As in testing, people would be detections, or have no labels.
        for key, value in (('test_mode', False), ('bbox_file', None)):
            if key in dataset:
                dataset[key] = value
        options['dataset'] = dataset
    return options


def _pipeline(dataset: Mapping[str, Any]) -> Any:
    """The pipeline of a data set's config, or of the one that it wraps (repeated data sets)."""
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return dataset.get('pipeline')


def _name(dataset: Mapping[str, Any]) -> str:
    kind = dataset.get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    while not dataset.get('ann_file') and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return f'{name} {dataset["ann_file"]}' if dataset.get('ann_file') else name


def _digest(rows: list[Any], collate: Callable[[list[Any]], Any]) -> str:
    """Of the first tensor of each sample, which is the image (or what else the model takes in)."""
    total = hashlib.sha256()
    for row in rows:
        tensor = _first_tensor(collate([row]))
        if tensor is not None:
            total.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:12]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = [value['inputs']] if 'inputs' in value else list(value.values())
    if isinstance(value, (list, tuple)):
        return next((found for item in value if (found := _first_tensor(item)) is not None), None)
    return None

"""A data set of MMPose that keeps in memory what its pipeline would do again in every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.structures import BaseDataElement
from mmpose.datasets import CocoDataset
from mmpose.registry import DATASETS

# What the cached part of the pipeline gives, by index, of each data set by its arguments.
_CACHE: dict[str, dict[int, dict[str, Any]]] = {}
# Transforms without any randomness: they give the same in every epoch. All others may draw random numbers.
_FIXED = ('LoadImage', 'GetBBoxCenterScale', 'TopdownAffine', 'GenerateTarget', 'PackPoseInputs')


@DATASETS.register_module()
class CachedCocoDataset(CocoDataset):  # type: ignore[misc]
    """``CocoDataset`` that runs the beginning of its pipeline once for each sample, up to the first random transform.

    A study trains a small model hundreds of times on the same few thousand pictures: to decode them each time would
    take as long as the steps. Without random augmentation whole samples are kept; with it decoded pictures, on which
    augmentation is drawn anew each time. All data sets of a process that have the same arguments share what is kept.
    Use it with ``num_workers=0``: each worker would keep its own. ``configs/study/_base_/keypoints.py`` shows how.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._cached = _CACHE.setdefault(repr((args, sorted(kwargs.items()))), {})
        super().__init__(*args, **kwargs)
        kinds = [type(transform).__name__ for transform in self.pipeline.transforms]
        self._fixed = next((place for place, kind in enumerate(kinds) if kind not in _FIXED), len(kinds))

    def prepare_data(self, idx: int) -> Any:
        """The pipeline's result for sample ``idx``."""
        if idx not in self._cached:
            self._cached[idx] = self._run(self.get_data_info(idx), 0, self._fixed)
        sample = {key: _own(value) for key, value in self._cached[idx].items()}
        if self._fixed == len(self.pipeline.transforms):
            return sample
        # Augmentation may write into arrays.
        arrays = {key: value.copy() for key, value in sample.items() if isinstance(value, np.ndarray)}
        return self._run({**sample, **arrays, 'dataset': self}, self._fixed, len(self.pipeline.transforms))

    def _run(self, results: dict[str, Any], start: int, end: int) -> dict[str, Any]:
        for transform in self.pipeline.transforms[start:end]:
            results = transform(results)
        return results


def _own(value: Any) -> Any:
    # A data sample's new() has a list of fields of its own, to which predictions are added; copy.copy() has not.
    return value.new() if isinstance(value, BaseDataElement) else value

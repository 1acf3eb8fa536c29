"""A data set of MMPose that keeps its pre-processed samples in memory."""

from __future__ import annotations

from typing import Any

from mmengine.structures import BaseDataElement
from mmpose.datasets import CocoDataset
from mmpose.registry import DATASETS

_CACHE: dict[str, dict[int, dict[str, Any]]] = {}  # the samples by index, of each data set by its arguments


@DATASETS.register_module()
class CachedCocoDataset(CocoDataset):  # type: ignore[misc]
    """``CocoDataset`` that runs its pipeline once for each sample.

    To decode and crop the pictures of a small model each time would take as long as the steps. Samples are kept as long
    as the process, for all data sets with the same arguments. Only for pipelines without random augmentation, and with
    ``num_workers=0``: each worker would keep its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._cached = _CACHE.setdefault(repr((args, sorted(kwargs.items()))), {})
        super().__init__(*args, **kwargs)

    def prepare_data(self, idx: int) -> Any:
        """The pipeline's result for sample ``idx``: calls share the picture, but not the data sample."""
        if idx not in self._cached:
            self._cached[idx] = super().prepare_data(idx)
        # A data sample's new() has a list of fields of its own, to which predictions are added; copy.copy() has not.
        return {k: v.new() if isinstance(v, BaseDataElement) else v for k, v in self._cached[idx].items()}

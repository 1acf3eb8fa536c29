"""A data set of MMPose whose pre-processed samples are kept in memory (ours)."""

from __future__ import annotations

from typing import Any

from mmengine.structures import BaseDataElement
from mmpose.datasets import CocoDataset
from mmpose.registry import DATASETS

# Of each data set, by its arguments: the outcomes by index.
_REMEMBERED: dict[str, dict[int, dict[str, Any]]] = {}


@DATASETS.register_module()
class CachedCocoDataset(CocoDataset):  # type: ignore[misc]
    """``CocoDataset`` that runs its pipeline once for each sample, and gives the outcome again from then on.

    A study trains a small model hundreds of times on the same few thousand pictures: decoding and cropping them again
    would take as long as the steps. So the outcomes stay as long as the process, for every data set with the same
    arguments. Only for pipelines without random augmentation, and in the main process (``num_workers=0``), since each
    worker would remember for itself.

    Example:
        In a config::

            custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.cached'])
            train_dataloader = dict(
                num_workers=0, persistent_workers=False, dataset=dict(type='CachedCocoDataset', ...))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._remembered = _REMEMBERED.setdefault(repr((args, sorted(kwargs.items()))), {})
        super().__init__(*args, **kwargs)

    def prepare_data(self, idx: int) -> Any:
        """The pipeline's outcome for sample ``idx``: the picture is shared between calls, what holds it is not."""
        if idx not in self._remembered:
            self._remembered[idx] = super().prepare_data(idx)
        # A data sample's new() has a list of fields of its own, which predictions are added to; copy.copy() has not.
        return {
            name: value.new() if isinstance(value, BaseDataElement) else value
            for name, value in self._remembered[idx].items()
        }

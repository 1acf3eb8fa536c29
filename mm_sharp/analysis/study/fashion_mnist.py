"""Fashion-MNIST through MMPretrain, some training labels flipped; see ``configs/study/lenet5_fashion-mnist.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from mmpretrain.datasets import FashionMNIST

from mm_sharp.analysis.study.digits import FORM, flip_labels
from mm_sharp.errors import check_number


@DATASETS.register_module()
class FlippedFashionMNIST(FashionMNIST):  # type: ignore[misc]
    """MMPretrain's ``FashionMNIST``, of whose first ``count`` pictures a share has another label.

    Args:
        flipped: Share of the labels, in [0, 1], that are replaced by another class; it is met exactly.
        count: Number of pictures, from the first one on; all by default.
        start: The first of them.
        seed: Of the flipped labels.

    Raises:
        ValueError: ``flipped`` is out of range.
    """

    def __init__(
        self, *args: Any, flipped: float = 0.0, start: int = 0, count: int | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        check_number(type(self).__name__, 'flipped', flipped, high=1.0, example='0.2', form=FORM)
        self._flipped, self._rows, self._flip_seed = flipped, slice(start, count and start + count), seed
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict a picture: ``img`` (28, 28) and ``gt_label``."""
        samples: list[dict[str, Any]] = super().load_data_list()[self._rows]
        labels = np.array([int(sample['gt_label']) for sample in samples])
        for sample, label in zip(samples, flip_labels(labels, self._flipped, self._flip_seed), strict=True):
            sample['gt_label'] = np.array(label)
        return samples

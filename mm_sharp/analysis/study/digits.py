"""Classification of small real pictures, which takes seconds on one core; see ``configs/study/digits_cnn.py``.

The pictures are scikit-learn's digits: 1,797 handwritten ones, 8x8 pixels, of 10 classes (the test part of the UCI
"Optical Recognition of Handwritten Digits" set), so nothing is downloaded. Three splits are the same in every run: 800
pictures to train on, 297 to choose settings such as ``rho`` by, and 700 to report on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torch.utils.data import Dataset

from mm_sharp.errors import UserError, check_choice, check_number, check_positive_int

CLASSES = 10
SPLITS = {'train': (0, 800), 'select': (800, 1097), 'report': (1097, 1797)}
FORM = "dataset = dict(type='{owner}', {name}={example}, ...)"


@DATASETS.register_module()
class DigitsDataset(Dataset[dict[str, Any]]):
    """Handwritten digits. A sample is a dict of ``inputs`` (1, 8, 8), in [-1, 1], ``targets`` and ``sample_idx``.

    ``sample_idx``, a picture's place in scikit-learn's order, is its key in the sample history.

    Args:
        split: ``'train'``, ``'select'`` or ``'report'``. Each has the classes in nearly equal shares.
        flipped: Share of the training labels, in [0, 1], that are replaced by another class; it is met exactly.
        size: Number of training samples, 800 by default. Any number has the classes in nearly equal shares.
        seed: Of the flipped labels.

    Raises:
        ValueError: An argument is out of range, or labels outside of the training split are to be flipped.
        ImportError: scikit-learn is not installed.
    """

    metainfo = {'classes': [str(digit) for digit in range(CLASSES)]}  # noqa: RUF012  (MMEngine reads it)

    def __init__(self, split: str = 'train', flipped: float = 0.0, size: int | None = None, seed: int = 0) -> None:
        name = type(self).__name__
        check_choice(name, 'split', split, tuple(SPLITS), form=FORM)
        check_number(name, 'flipped', flipped, high=1.0, example='0.2', form=FORM)
        start, end = SPLITS[split]
        if size is not None:
            check_positive_int(name, 'size', size, example='400', form=FORM)
        if (size or 0) > end - start or (split != 'train' and (flipped or size is not None)):
            raise UserError(
                f'{name}: split={split!r}, flipped={flipped!r}, size={size!r} is not allowed: labels are flipped and '
                f'samples left out in the training split alone, which has {SPLITS["train"][1]} samples. Write for '
                f"example: dataset = dict(type='{name}', split='train', flipped=0.2, size=400)"
            )
        try:
            from sklearn.datasets import load_digits  # only here: the package does not require it
        except ImportError as error:
            raise ImportError(f'{name} takes its pictures from scikit-learn: pip install scikit-learn') from error
        pictures, labels = load_digits().images, load_digits().target.astype(np.int64)
        rows = _balanced_order(labels)[start:end][:size]
        self.ids = torch.from_numpy(rows)
        self.inputs = torch.from_numpy(pictures[rows, None] / 8 - 1).float()  # (N, 1, 8, 8)
        self.true_targets = torch.from_numpy(labels[rows])  # before some are flipped
        self.targets = torch.from_numpy(flip_labels(labels[rows], flipped, seed))

    def __len__(self) -> int:
        return len(self.targets)

    def get_data_info(self, index: int) -> dict[str, int]:
        """A sample's key, before it is loaded."""
        return {'sample_idx': int(self.ids[index])}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'inputs': self.inputs[index], 'targets': self.targets[index], **self.get_data_info(index)}


@MODELS.register_module()
class DigitsNet(BaseModel):  # type: ignore[misc]
    """A small convolutional classifier with BatchNorm: ``width`` channels in the first layer, twice as many later."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        check_positive_int(type(self).__name__, 'width', width, example='16', form="model = dict(type='{owner}', ...)")
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(2 * width * 2 * 2, CLASSES)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'tensor') -> Any:
        """Logits (N, 10) of pictures (N, 1, 8, 8), or by ``mode`` the loss, or a dict for each sample."""
        logits = self.head(self.backbone(inputs))
        if mode == 'loss':
            return {'loss_cls': self.loss(logits, targets)}
        if mode == 'predict':
            pairs = zip(logits.log_softmax(1).cpu(), targets.cpu(), strict=True)
            return [{'log_probabilities': row, 'target': target} for row, target in pairs]
        return logits


@METRICS.register_module()
class DigitsAccuracy(BaseMetric):  # type: ignore[misc]
    """``digits/accuracy``: top-1, in percent; ``digits/nll``: mean negative log-likelihood of the label, in nats."""

    default_prefix = 'digits'

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record whether each sample is right, and its negative log-likelihood."""
        for sample in data_samples:
            row, target = sample['log_probabilities'], int(sample['target'])
            self.results.append((int(row.argmax()) == target, -float(row[target])))

    def compute_metrics(self, results: list[tuple[bool, float]]) -> dict[str, float]:
        """Both metrics over the whole split."""
        right, losses = zip(*results, strict=True)
        return {'accuracy': 100 * float(np.mean(right)), 'nll': float(np.mean(losses))}


def flip_labels(labels: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
    """A copy of labels (N,), of which ``round(share * N)`` are another class, each of the others equally likely."""
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(labels))[: round(share * len(labels))]
    flipped = labels.copy()
    flipped[rows] = (labels[rows] + generator.integers(1, CLASSES, len(rows))) % CLASSES
    return flipped


def _balanced_order(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A fixed random order (N,), in which every stretch has the classes in nearly equal shares."""
    generator = np.random.default_rng(0)
    places = np.empty(len(labels))
    for digit in range(CLASSES):
        rows = generator.permutation(np.flatnonzero(labels == digit))
        places[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(places, kind='stable')

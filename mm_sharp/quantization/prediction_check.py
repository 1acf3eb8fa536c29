"""The outputs of an exported model, the keypoints that they mean and the metric, against PyTorch's (ours).

Both programs' outputs go through the same code of MMPose's: flip test, decoding, metrics. So what differs is what the
networks compute.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from numpy.typing import NDArray
from torch import Tensor

Outputs = Sequence[NDArray[np.float32]]


@dataclass
class OutputAgreement:
    """One of the model's outputs, which are float: no quantizer follows them.

    Args:
        name: Its name.
        largest: The largest difference.
        low: PyTorch's smallest value.
        high: PyTorch's largest value.
    """

    name: str
    largest: float = 0.0
    low: float = float('inf')
    high: float = float('-inf')

    def add(self, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
        """Compare a batch; a value that is not finite in one and is in the other makes the difference infinite."""
        if ours.shape != theirs.shape:
            raise RuntimeError(f"output {self.name}: PyTorch's shape is {ours.shape}, the export's {theirs.shape}")
        with np.errstate(invalid='ignore'):
            difference = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
        self.largest = max(self.largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        self.low, self.high = min(self.low, float(ours.min())), max(self.high, float(ours.max()))


def predict(model: Any, outputs: Sequence[Outputs], inputs: Tensor, samples: Sequence[Any]) -> list[Any]:
    """What MMPose makes of a network's outputs.

    Args:
        model: The estimator, whose own network is not run.
        outputs: The head's outputs for the batch and, with a flip test, for the flipped batch.
        inputs: The batch, as it leaves the data preprocessor.
        samples: Its data samples; they are left as they are.

    Returns:
        Copies of the data samples, with predictions.
    """
    # Heads decode in place; so they are given copies.
    waiting = iter([tuple(torch.from_numpy(np.array(array)) for array in batch) for batch in outputs])
    with _instead(model, extract_feat=lambda _: next(waiting)), _instead(model.head, forward=_head_output):
        return list(model.predict(inputs, deepcopy(list(samples))))


def keypoint_distances(ours: Sequence[Any], theirs: Sequence[Any]) -> NDArray[np.float64]:
    """(people, keypoints): how far two predictions are apart, in pixels of the network's input."""
    distances = []
    for one, other in zip(ours, theirs, strict=True):
        scale = np.asarray(one.metainfo['input_scale']) / np.asarray(one.metainfo['input_size'])
        difference = (one.pred_instances.keypoints - other.pred_instances.keypoints)[..., :2] / scale
        distances.append(np.linalg.norm(difference, axis=-1).reshape(-1))
    return np.stack(distances)


def evaluate(metrics: Any, dataset_meta: Mapping[str, Any], samples: Sequence[Any]) -> dict[str, float]:
    """A config's metrics of predictions on a part of its test set.

    Metrics with an annotation file of COCO's form judge all of its pictures; they are given a copy with only those that
    there are predictions for, since a person whom nobody looked for is not one who was missed.

    Args:
        metrics: The config's ``test_evaluator``.
        dataset_meta: The data set's ``metainfo``.
        samples: Data samples with predictions.

    Returns:
        The metrics by name.
    """
    images = {sample.metainfo.get('img_id') for sample in samples}
    configs = [deepcopy(config) for config in (metrics if isinstance(metrics, (list, tuple)) else [metrics])]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for i, config in enumerate(configs):
            if config.get('ann_file'):
                config['ann_file'] = _annotations_of(config['ann_file'], images, Path(folder, f'{i}.json'))
        evaluator = Evaluator(configs)
        evaluator.dataset_meta = dict(dataset_meta)
        evaluator.process(samples, None)
        values = evaluator.evaluate(len(samples))
    return {name: float(value) for name, value in values.items()}


def _annotations_of(file: str, images: set[Any], part: Path) -> str:
    """Write the annotations of some pictures; returns the new file, or the old one if its form is another."""
    if not Path(file).is_file() or Path(file).suffix != '.json':
        return file
    content = json.loads(Path(file).read_text(encoding='utf-8'))
    if not isinstance(content, dict) or not {'images', 'annotations'} <= content.keys():
        return file
    kept = {
        'images': [image for image in content['images'] if image['id'] in images],
        'annotations': [person for person in content['annotations'] if person['image_id'] in images],
    }
    part.write_text(json.dumps({**content, **kept}), encoding='utf-8')
    return str(part)


def _head_output(outputs: tuple[Tensor, ...]) -> Any:
    """What a head's forward returns: one tensor by itself."""
    return outputs[0] if len(outputs) == 1 else outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables that metrics print and log."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _instead(module: Any, **methods: Any) -> Iterator[None]:
    """Replace methods of one object."""
    module.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del module.__dict__[name]

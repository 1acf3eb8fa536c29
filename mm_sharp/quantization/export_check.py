"""Run a model and its exported file on the same pictures, and compare integers, outputs, keypoints and metrics.

Float sums differ in their last bits, and what lies halfway between two integers is rounded up by one program and down
by the other; in the whole network such flips add up. So a second comparison gives every layer PyTorch's quantized input
(without ONNX Runtime's optimizations, which round biases). Outputs go through the same code of MMPose, and
:mod:`mm_sharp.quantization.export_report` judges.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from numpy.typing import NDArray
from torch import Tensor, nn

from .export import METADATA_KEY, Network, has_stages
from .export_report import ExportReport, LayerAgreement, OutputAgreement
from .flow import forward_hooks
from .onnx_graph import FORCED, Arrays, Run, activation_points, runner, with_inputs

Outputs = Sequence[NDArray[np.float32]]


class ExportCheck:
    """Run a model, in evaluation mode, and its exported file on the same batches."""

    def __init__(self, model: nn.Module, file: str | Path) -> None:
        graph = onnx.load(str(file))
        constants = json.loads({entry.key: entry.value for entry in graph.metadata_props}[METADATA_KEY])
        self._file, self._format = str(file), str(constants['format'])
        self._model: Any = model
        self._network = Network(model)
        self._run = runner(graph, self._format)
        self._integers = IntegerCheck(graph, self._format)
        self._outputs = [OutputAgreement(name) for name in constants['outputs']]
        self._flip = bool(constants['flip_test'])
        self._predictions: tuple[list[Any], list[Any]] = ([], [])

    @torch.no_grad()
    def add(self, batch: Mapping[str, Any]) -> int:
        """Compare a batch as a data loader collates it; returns how many samples it has."""
        data = self._model.data_preprocessor(deepcopy(batch), False)
        inputs, samples = data['inputs'], data['data_samples']
        with recording(self._model) as records:
            ours = [self._pytorch(inputs)]
        inside = self._integers.add(inputs.cpu().numpy(), records)
        # qonnx runs the same nodes either way, slowly.
        theirs = [self._named(inside) if self._format == 'qonnx' else self._exported(inputs)]
        for agreement, one, other in zip(self._outputs, ours[0], theirs[0], strict=True):
            agreement.add(one, other)
        if self._flip:
            flipped = inputs.flip(-1)
            ours.append(self._pytorch(flipped))
            theirs.append(self._exported(flipped))
        for predictions, outputs in zip(self._predictions, (ours, theirs), strict=True):
            predictions += predict(self._model, outputs, inputs, samples)
        return len(samples)

    def report(self, metrics: Any, dataset_meta: Mapping[str, Any]) -> ExportReport:
        """Evaluate both programs' predictions by the config's ``test_evaluator``, and sum up."""
        ours, theirs = (evaluate(metrics, dataset_meta, predictions) for predictions in self._predictions)
        return ExportReport(
            file=self._file,
            file_format=self._format,
            samples=len(self._predictions[0]),
            layers=self._integers.layers,
            outputs=self._outputs,
            distances=keypoint_distances(*self._predictions).tolist(),
            metrics={name: (ours[name], theirs[name]) for name in ours},
        )

    def _pytorch(self, inputs: Tensor) -> Outputs:
        return [output.cpu().numpy() for output in self._network(inputs)]

    def _exported(self, inputs: Tensor) -> Outputs:
        return self._named(self._run({'input': inputs.cpu().numpy()}))

    def _named(self, made: Arrays) -> Outputs:
        return [made[output.name] for output in self._outputs]


# ------------------------------------------------------------------ integers
@dataclass(frozen=True)
class Quantized:
    """What an activation quantizer of PyTorch made of a batch: integers times the scale."""

    layer: str
    values: NDArray[np.float32]
    scale: float
    zero_point: float

    def integers(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Values of either program as integers."""
        steps: NDArray[Any] = np.rint(values / np.float32(self.scale) + np.float32(self.zero_point))
        return steps.astype(np.int32)


class IntegerCheck:
    """Compare all quantized activations of a model and its exported graph, batch after batch."""

    def __init__(self, graph: onnx.ModelProto, file_format: str) -> None:
        self._graph, self._format = graph, file_format
        self._points = activation_points(graph)
        self._names = [point.tensor for point in self._points]
        self._run = runner(graph, file_format, self._names)
        self._run_alone: Run | None = None
        self.layers: list[LayerAgreement] = []

    def add(self, inputs: NDArray[np.float32], records: Sequence[Quantized]) -> Arrays:
        """Compare a batch with what :func:`recording` has of PyTorch; returns what the graph made of it."""
        own = dict(zip(self._names, self._paired(records), strict=True))
        if self._run_alone is None:
            graph = with_inputs(self._graph, {name: record.values.shape for name, record in own.items()})
            self._run_alone = runner(graph, self._format, self._names, optimized=False)
            self.layers = [LayerAgreement(record.layer) for record in own.values()]
        network = self._run({'input': inputs})
        alone = self._run_alone({'input': inputs, **{name + FORCED: own[name].values for name in own}})
        for (name, record), layer in zip(own.items(), self.layers, strict=True):
            ours = record.integers(record.values)
            layer.network.add(ours, record.integers(network[name]))
            layer.alone.add(ours, record.integers(alone[name]))
        return network

    def _paired(self, records: Sequence[Quantized]) -> list[Quantized]:
        """For each place in the graph, in the order of the forward pass, what PyTorch recorded there.

        A quantizer that nothing depends on is not in the graph.
        """
        found: list[Quantized] = []
        for record in records:
            point = self._points[len(found)] if len(found) < len(self._points) else None
            # Integers that the file has as uint8, and the model as int8, are 128 apart.
            if point and record.scale == point.scale and point.zero_point - record.zero_point in (0, 128):
                found.append(record)
        if len(found) < len(self._points):
            raise RuntimeError(
                f"the exported graph's quantizer {self._points[len(found)].node} is none of the model's: the file was "
                'exported from another model, or from this one with other weights'
            )
        return found


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Quantized]]:
    """Collect what the activation quantizers of a model make of the batch that runs inside, in order."""
    records: list[Quantized] = []

    def keep(name: str, module: nn.Module, args: Any, made: Any) -> None:
        values = made.value.cpu().numpy().copy()  # what follows may work in place
        records.append(Quantized(name, values, made.scale.item(), made.zero_point.item()))

    with forward_hooks(model, lambda _, m: isinstance(m, ActQuantProxyFromInjectorBase) and m.is_quant_enabled, keep):
        yield records


# ------------------------------------------------------------------ predictions
def predict(model: Any, outputs: Sequence[Outputs], inputs: Tensor, samples: Sequence[Any]) -> list[Any]:
    """What MMPose makes of a network's outputs: copies of the data samples, with predictions.

    Args:
        model: The estimator, whose own network is not run.
        outputs: The head's outputs for the batch and, with a flip test, for the flipped batch.
        inputs: The batch, as it leaves the data preprocessor.
        samples: Its data samples.
    """
    # Heads decode in place, so they are given copies.
    remaining = iter([tuple(torch.from_numpy(np.array(array)) for array in batch) for batch in outputs])
    bare = len(outputs[0]) == 1 and not has_stages(model)
    with (
        patch.object(model, 'extract_feat', lambda _: next(remaining)),
        patch.object(model.head, 'forward', lambda made: made[0] if bare else made),
    ):
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
    """A config's metrics, by name, of predictions on a part of its test set.

    COCO's metric judges all pictures of its annotation file; it is given one with only those that were looked at.
    """
    images = {sample.metainfo.get('img_id') for sample in samples}
    configs = [deepcopy(config) for config in (metrics if isinstance(metrics, (list, tuple)) else [metrics])]
    # Without the tables that metrics print and log.
    silent = patch.object(MMLogger.get_current_instance(), 'disabled', True)
    with tempfile.TemporaryDirectory() as folder, silent, redirect_stdout(io.StringIO()):
        for i, config in enumerate(configs):
            if str(config.get('ann_file')).endswith('.json') and Path(config['ann_file']).is_file():
                config['ann_file'] = _annotations_of(config['ann_file'], images, Path(folder, f'{i}.json'))
        evaluator = Evaluator(configs)
        evaluator.dataset_meta = dict(dataset_meta)
        evaluator.process(samples, None)
        values = evaluator.evaluate(len(samples))
    return {name: float(value) for name, value in values.items()}


def _annotations_of(file: str, images: set[Any], part: Path) -> str:
    """Write the annotations of some pictures; returns the new file, or the old one if its form is another."""
    content = json.loads(Path(file).read_text(encoding='utf-8'))
    if not isinstance(content, dict) or not {'images', 'annotations'} <= content.keys():
        return file
    content['images'] = [image for image in content['images'] if image['id'] in images]
    content['annotations'] = [person for person in content['annotations'] if person['image_id'] in images]
    part.write_text(json.dumps(content), encoding='utf-8')
    return str(part)

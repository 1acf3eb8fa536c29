"""Run a model and its exported file on the same pictures, and compare (ours).

:mod:`mm_sharp.quantization.integer_check` compares inside the network, :mod:`mm_sharp.quantization.prediction_check`
behind it; :mod:`mm_sharp.quantization.export_report` judges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .export import METADATA_KEY, Network
from .export_report import ExportReport
from .integer_check import IntegerCheck, recording
from .onnx_run import Arrays, runner
from .prediction_check import OutputAgreement, Outputs, evaluate, keypoint_distances, predict


class ExportCheck:
    """Run a model and its export on the same batches.

    Args:
        model: What was exported, in evaluation mode.
        file: The ONNX file.
    """

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
        """Evaluate both programs' predictions, and sum up.

        Args:
            metrics: The config's ``test_evaluator``.
            dataset_meta: The data set's ``metainfo``.
        """
        ours, theirs = self._predictions
        values = [evaluate(metrics, dataset_meta, predictions) for predictions in (ours, theirs)]
        return ExportReport(
            file=self._file,
            file_format=self._format,
            samples=len(ours),
            layers=self._integers.layers,
            outputs=self._outputs,
            distances=keypoint_distances(ours, theirs).tolist(),
            metrics={name: (values[0][name], values[1][name]) for name in values[0]},
        )

    def _pytorch(self, inputs: Tensor) -> Outputs:
        return [output.cpu().numpy() for output in self._network(inputs)]

    def _exported(self, inputs: Tensor) -> Outputs:
        return self._named(self._run({'input': inputs.cpu().numpy()}))

    def _named(self, made: Arrays) -> Outputs:
        return [made[output.name] for output in self._outputs]


def first_samples(dataset: Mapping[str, Any], count: int, batch_size: int) -> tuple[Any, DataLoader[Any]]:
    """The first samples of a data set, in batches.

    Args:
        dataset: Its config.
        count: How many; all, if there are fewer.
        batch_size: Samples a batch.

    Returns:
        The data set, and its batches.
    """
    built = DATASETS.build(dict(dataset))
    part = Subset(built, range(min(count, len(built))))
    return built, DataLoader(part, batch_size=batch_size, collate_fn=pseudo_collate)

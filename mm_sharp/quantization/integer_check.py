"""The integers of an exported graph against PyTorch's, layer by layer (ours).

Float sums differ in their last bits between two programs, and where a value is about halfway between two integers it is
rounded up by one and down by the other. Such a flip changes what the next layers see, and so makes more of them: how
many integers differ in the whole network says as much about its depth as about the export. Hence a second comparison,
one layer at a time: every layer is given PyTorch's integers, so that what differs behind it is its own doing. There a
right export differs in a few integers of a million, by one step.

ONNX Runtime has an approximation of its own: where it computes a convolution in integers, it rounds the bias to what
accumulators count in. With few products to a sum, as in MobileNet's layers at 4 bits, a hundredth of a layer's integers
can differ for that by a step. The first comparison is with it, since that is what runs; the second without, since it is
about the file. Integers are read in copies of the graph that have them as outputs, in which a little less is fused; the
outputs of the file itself are compared, too (:mod:`mm_sharp.quantization.prediction_check`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from numpy.typing import NDArray
from torch import nn

from .onnx_graph import FORCED, ActivationPoint, activation_points, with_inputs
from .onnx_run import Arrays, Run, runner


@dataclass
class Agreement:
    """How far integers agree.

    Args:
        values: How many were compared.
        equal: How many are equal.
        largest: The largest difference, in quantization steps.
    """

    values: int = 0
    equal: int = 0
    largest: int = 0

    @property
    def share(self) -> float:
        """Fraction of equal integers, 1 if there are none."""
        return self.equal / self.values if self.values else 1.0

    def add(self, ours: NDArray[np.int32], theirs: NDArray[np.int32]) -> None:
        """Compare two arrays of the same shape."""
        if ours.shape != theirs.shape:
            raise RuntimeError(f'PyTorch computes {ours.shape} integers where the exported model has {theirs.shape}')
        difference = np.abs(ours - theirs)
        self.values += difference.size
        self.equal += int((difference == 0).sum())
        self.largest = max(self.largest, int(difference.max(initial=0)))


@dataclass
class LayerAgreement:
    """A quantized activation in both programs.

    Args:
        layer: Name of its quantizer in the model.
        network: Agreement when the whole network ran in each program.
        alone: Agreement when the exported layers were given PyTorch's integers, and their biases stayed in float.
    """

    layer: str
    network: Agreement = field(default_factory=Agreement)
    alone: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class Quantized:
    """What an activation quantizer of PyTorch's made of a batch.

    Args:
        layer: Its name.
        integers: Of the activation's shape.
        scale: Size of a step.
        zero_point: The integer that stands for 0.
    """

    layer: str
    integers: NDArray[np.int32]
    scale: float
    zero_point: float


class IntegerCheck:
    """Compare all quantized activations of a model and its export, batch after batch.

    Args:
        graph: The exported graph.
        file_format: ``'qcdq'`` or ``'qonnx'``.
    """

    def __init__(self, graph: onnx.ModelProto, file_format: str) -> None:
        self._graph = graph
        self._format = file_format
        self._points = activation_points(graph)
        self._read = runner(graph, file_format, self._points)
        self._forced: Run | None = None
        self.layers: list[LayerAgreement] = []

    def add(self, inputs: NDArray[np.float32], records: Sequence[Quantized]) -> Arrays:
        """Compare a batch.

        Args:
            inputs: (N, 3, H, W), as they leave the data preprocessor.
            records: What PyTorch's quantizers made of them, by :func:`recording`.

        Returns:
            What the graph made of them, at its outputs and at its quantizers.

        Raises:
            RuntimeError: The graph's quantizers are not the model's.
        """
        own = paired(self._points, records)
        if self._forced is None:
            shapes = {point.tensor: record.integers.shape[1:] for point, record in zip(self._points, own, strict=True)}
            graph = with_inputs(self._graph, self._points, shapes)
            self._forced = runner(graph, self._format, self._points, float_biases=True)
            self.layers = [LayerAgreement(record.layer) for record in own]
        given: Arrays = {'input': inputs}
        network = self._read(given)
        forced = {p.tensor + FORCED: p.from_integers(r.integers) for p, r in zip(self._points, own, strict=True)}
        alone = self._forced({**given, **forced})
        for point, record, layer in zip(self._points, own, self.layers, strict=True):
            layer.network.add(record.integers, point.to_integers(network[point.tensor]))
            layer.alone.add(record.integers, point.to_integers(alone[point.tensor]))
        return network


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Quantized]]:
    """Collect what the activation quantizers of a model make of the batch that runs inside, in order."""
    records: list[Quantized] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            steps = output.value / output.scale + output.zero_point
            records.append(
                Quantized(
                    layer=name,
                    integers=torch.round(steps).to(torch.int32).cpu().numpy(),
                    scale=float(output.scale.item()),
                    zero_point=float(output.zero_point.item()),
                )
            )

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, ActQuantProxyFromInjectorBase) and module.is_quant_enabled
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def paired(points: Sequence[ActivationPoint], records: Sequence[Quantized]) -> list[Quantized]:
    """For each place in the graph, what PyTorch recorded there.

    Both are in the order of the forward pass. A quantizer that nothing depends on is not in the graph, and skipped.

    Raises:
        RuntimeError: A place has no quantizer of its scale, zero point and layer.
    """
    found, waiting = [], iter(records)
    for point in points:
        record = next((record for record in waiting if _same(point, record)), None)
        if record is None:
            raise RuntimeError(
                f"the exported graph's quantizer {point.node} (scale {point.scale:g}) is none of the model's: the file "
                'was exported from another model, or from this one with other weights'
            )
        found.append(record)
    return found


def _same(point: ActivationPoint, record: Quantized) -> bool:
    """Whether they have the same values and, in the node's path, the same layer."""
    layer = record.layer.split('.')[-2:-1]
    values = (point.scale, point.zero_point) == (record.scale, record.zero_point)
    return values and {_unnumbered(part) for part in layer} <= {_unnumbered(p) for p in re.split(r'[/.]', point.node)}


def _unnumbered(name: str) -> str:
    """A module's name without the number that the exporter appends to a second call of it."""
    return re.sub(r'_\d+$', '', name)

"""The integers of an exported graph against PyTorch's, layer by layer.

Float sums differ in their last bits between two programs, and what lies about halfway between two integers is rounded
up by one and down by the other. Such a flip makes more of them in the next layers. So how many integers differ in the
whole network, as it runs, says as much about its depth as about the export. There is a second comparison, one layer at
a time: every layer is given PyTorch's quantized input, so that what differs behind it is its own doing. It is about the
file, and so without ONNX Runtime's optimizations, which round the biases of convolutions in integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from numpy.typing import NDArray
from torch import nn

from .export_report import LayerAgreement
from .flow import forward_hooks
from .onnx_graph import FORCED, Arrays, Run, activation_points, runner, with_inputs


@dataclass(frozen=True)
class Quantized:
    """What an activation quantizer of PyTorch made of a batch: integers times the scale, and the two constants."""

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
        """Compare a batch, and return what the graph made of it, at its outputs and at its quantizers.

        Args:
            inputs: (N, 3, H, W), as they leave the data preprocessor.
            records: What PyTorch's quantizers made of them, by :func:`recording`.

        Raises:
            RuntimeError: The graph's quantizers are not the model's.
        """
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
        """For each place in the graph, what PyTorch recorded there.

        Both are in the order of the forward pass. A quantizer that nothing depends on is not in the graph, and skipped.
        """
        found, remaining = [], iter(records)
        for point in self._points:
            for record in remaining:
                if (record.scale, record.zero_point) == (point.scale, point.zero_point):
                    found.append(record)
                    break
            else:
                raise RuntimeError(
                    f"the exported graph's quantizer {point.node} (scale {point.scale:g}) is none of the model's: the "
                    'file was exported from another model, or from this one with other weights'
                )
        return found


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Quantized]]:
    """Collect what the activation quantizers of a model make of the batch that runs inside, in order."""
    records: list[Quantized] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, made: Any) -> None:
            records.append(Quantized(name, made.value.cpu().numpy(), made.scale.item(), made.zero_point.item()))

        return hook

    def is_quantizer(name: str, module: nn.Module) -> bool:
        return isinstance(module, ActQuantProxyFromInjectorBase) and bool(module.is_quant_enabled)

    with forward_hooks(model, keep, is_quantizer):
        yield records

"""Run an exported graph: QCDQ in ONNX Runtime, QONNX node by node in the package ``qonnx`` (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import onnx
import torch
from numpy.typing import NDArray

from .onnx_graph import ActivationPoint, with_outputs

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]


def runner(
    model: onnx.ModelProto, file_format: str, points: Sequence[ActivationPoint] = (), *, float_biases: bool = False
) -> Run:
    """A function from a graph's inputs to its outputs, both by name; batches of any size.

    Args:
        model: The graph.
        file_format: ``'qcdq'`` or ``'qonnx'``.
        points: Places inside the graph; what comes out there is returned too.
        float_biases: Keep ONNX Runtime from rounding biases, which it does to compute convolutions in integers.
    """
    if file_format == 'qcdq':
        return _OnnxRuntime(with_outputs(model, points) if points else model, float_biases)
    return _Qonnx(model, [*(output.name for output in model.graph.output), *(point.tensor for point in points)])


class _OnnxRuntime:
    """On the CPU, with ONNX Runtime's own optimizations, as it runs wherever nobody says otherwise.

    But for one setting: on x86 processors without VNNI instructions, products of 8-bit integers overflow unless they
    are computed in another way, which is asked for here. It is the file that is checked, not the processor.
    """

    def __init__(self, model: onnx.ModelProto, float_biases: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; warnings are about what is optimized, and how
        options.add_session_config_entry('session.x64quantprecision', '1')
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=['CPUExecutionProvider'],
            disabled_optimizers=['WeightBiasQuantization'] if float_biases else None,
        )
        self._names = [output.name for output in model.graph.output]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))


class _Qonnx:
    """The reference semantics of ``Quant``; slow, since every node is a session of its own."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        self._model = model
        self._names = names
        self._sized: dict[int, Any] = {}

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        from qonnx.core.onnx_exec import execute_onnx

        batch = len(next(iter(inputs.values())))
        if batch not in self._sized:
            self._sized[batch] = self._of_size(batch)
        made = execute_onnx(self._sized[batch], dict(inputs), return_full_exec_context=True)
        return {name: made[name] for name in self._names}

    def _of_size(self, batch: int) -> Any:
        """The model for one size of batch: qonnx executes graphs whose shapes are all known."""
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.infer_shapes import InferShapes

        model = deepcopy(self._model)
        for value in (*model.graph.input, *model.graph.output):
            size = value.type.tensor_type.shape.dim[0]
            size.ClearField('dim_param')
            size.dim_value = batch
        # The exporter wrote shapes for a batch of unknown size, which inference would keep.
        del model.graph.value_info[:]
        return ModelWrapper(model).transform(InferShapes())

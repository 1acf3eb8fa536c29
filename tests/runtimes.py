"""How many convolutions of a file the runtimes compute in integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime


def qlinear_convolutions(file: Path) -> tuple[int, int]:
    """ONNX Runtime's convolutions in integers, and all (deconvolutions apart), after its optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, 'optimized.onnx'))
        onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    convolutions = {kind: count for kind, count in kinds.items() if kind.endswith('Conv')}
    return convolutions['QLinearConv'], sum(convolutions.values())


def int8_convolutions(file: Path) -> tuple[int, int]:
    """The same of OpenVINO, from the model that it runs."""
    import openvino

    compiled = openvino.Core().compile_model(file, 'CPU')
    found = []
    for node in compiled.get_runtime_model().get_ops():
        info = {key: node.get_rt_info()[key].astype(str) for key in ('layerType', 'runtimePrecision')}
        if info['layerType'] == 'Convolution':
            found.append(info['runtimePrecision'])
    return sum(kind in ('u8', 'i8') for kind in found), len(found)

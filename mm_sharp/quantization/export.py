"""A quantized pose estimator as an ONNX file.

Two forms, both written by Brevitas (``brevitas.export``) through torch's TorchScript exporter, operator set 17:

- ``'qcdq'``: weights as integers, and QuantizeLinear, Clip and DequantizeLinear around every quantized layer. All of it
  is standard ONNX, which ONNX Runtime and compilers that start from it read.
- ``'qonnx'``: weights in float behind the operator ``Quant`` of the QONNX dialect (Pappalardo et al. 2022,
  arXiv 2206.07527), which keeps any number of bits as it is. FINN, hls4ml and the package ``qonnx`` read it.

The graph goes from the normalised picture to what the head computes; the batch's size is free. How to make its input
and how to read its outputs (:mod:`mm_sharp.quantization.deployment`) is in the file's metadata and in a JSON file
beside it. ``dynamo=False``: torch's newer exporter cannot store integer weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.errors import UserError

from .deployment import codec_constants
from .exportable import OPSET, exporting
from .guard import check_calibrated, record_of
from .packages import require

FORMATS = ('qcdq', 'qonnx')
# The key of a file's metadata under which the constants are, as JSON.
METADATA_KEY = 'mm_sharp'


class Network(nn.Module):
    """What is exported: from the normalised picture to the head's outputs.

    Args:
        model: A top-down pose estimator of MMPose's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) float to the head's outputs."""
        outputs = self.model(inputs, None, mode='tensor')
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def export_onnx(model: nn.Module, file: str | Path, file_format: str, constants: Mapping[str, Any]) -> Path:
    """Write a quantized model as ONNX. The model stays as it is: a copy is exported.

    Both files are complete before they replace those of the same name.

    Args:
        model: A calibrated model, built with ``QuantizedModel``.
        file: The ONNX file; folders are made. The constants go to the same name with ``.json``.
        file_format: ``'qcdq'`` or ``'qonnx'``.
        constants: What the file says of itself, as :func:`mm_sharp.quantization.deployment.deployment_constants`
            returns it; the format and the names of the outputs are added.

    Returns:
        The file.

    Raises:
        ValueError: The format is unknown.
        UserError: The model is not quantized, its head's outputs are not known, or ONNX has no form of an operator.
        NotCalibratedError: The model is not calibrated.
        ImportError: A package is missing.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r} is not allowed: one of {', '.join(FORMATS)}, as format='qcdq'")
    check_quantized(model)
    check_calibrated(model)
    require('exporting', 'onnx', 'onnxoptimizer', 'brevitas')
    import onnx

    from .onnx_biases import set_biases_apart
    from .onnx_tidy import set_outputs, tidy

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix='.export-') as folder:
        written = Path(folder, file.name)
        outputs = _write(model, written, file_format)
        constants = {**constants, 'format': file_format, 'outputs': list(outputs)}
        graph = onnx.load(written)
        tidy(graph)
        if file_format == 'qcdq':
            set_biases_apart(graph)
        set_outputs(graph, outputs)
        _describe(graph, constants)
        onnx.checker.check_model(graph)
        onnx.save(graph, written)
        sidecar = Path(folder, 'constants.json')
        sidecar.write_text(json.dumps(constants, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(written, file)
        os.replace(sidecar, file.with_suffix('.json'))
    return file


def check_quantized(model: nn.Module) -> None:
    """Refuse float models.

    Raises:
        UserError: The model is not quantized; the message says how it becomes so.
    """
    if record_of(model) is None:
        raise UserError(
            f'model={type(model).__name__} is a float model: quantize it by a fragment, as '
            "_base_ = [RECIPE, 'mm_sharp::_base_/quantization/w8a8.py'], run tools/train.py, which calibrates and "
            'trains it, and export the checkpoint of that run'
        )


def output_names(outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of a head's outputs.

    Args:
        outputs: Two of shape (N, K, bins): SimCC's; one of shape (N, K, H, W): heatmaps; or one of shape (N, K, 2 or
            more): coordinates.

    Raises:
        UserError: They are something else.
    """
    dimensions = [output.ndim if isinstance(output, Tensor) else 0 for output in outputs]
    names = {(3, 3): ('simcc_x', 'simcc_y'), (4,): ('heatmaps',), (3,): ('keypoints',)}.get(tuple(dimensions))
    if names is None:
        shapes = [list(getattr(output, 'shape', [])) or type(output).__name__ for output in outputs]
        raise UserError(
            f"the head's outputs, {shapes}, are not known to the export: it takes heads with a pair of SimCC vectors "
            '(N, K, bins), with heatmaps (N, K, H, W) or with coordinates (N, K, 2 or more)'
        )
    return names


def _write(model: nn.Module, file: Path, file_format: str) -> dict[str, list[int]]:
    """Have Brevitas write a copy of the model.

    Returns:
        By name, the shapes of the outputs; the batch's size is in them.
    """
    from brevitas.export import export_onnx_qcdq, export_qonnx

    network = Network(deepcopy(model)).cpu().float().eval()
    width, height = codec_constants(model)['input_size']
    # Two pictures, so that nothing in the graph can take the batch's size for the number 1.
    inputs = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        outputs = network(inputs)
    names = output_names(outputs)
    export = export_onnx_qcdq if file_format == 'qcdq' else export_qonnx
    with exporting():
        export(
            network,
            args=inputs,
            export_path=str(file),
            input_names=['input'],
            output_names=list(names),
            dynamic_axes={name: {0: 'batch'} for name in ('input', *names)},
            opset_version=OPSET,
            dynamo=False,
            # Weights are constants, not inputs that a caller could replace.
            keep_initializers_as_inputs=False,
        )
    return {name: list(output.shape) for name, output in zip(names, outputs, strict=True)}


def _describe(graph: Any, constants: Mapping[str, Any]) -> None:
    """Write the metadata."""
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(constants, ensure_ascii=False)
    graph.producer_name, graph.producer_version = 'mm_sharp', str(constants.get('versions', {}).get('mm_sharp', ''))

"""A quantized pose estimator as an ONNX file, from the normalised picture, whose size is fixed, to the head's outputs.

``'qcdq'`` is standard ONNX: integer weights, QuantizeLinear, Clip and DequantizeLinear. ``'qonnx'`` has float weights
behind ``Quant`` (Pappalardo et al. 2022, arXiv 2206.07527), for any number of bits: FINN, hls4ml and ``qonnx`` read it.
``'float'`` is a float model, or a quantized one without its quantizers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from inspect import signature
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional as F  # noqa: N812

from mm_sharp.errors import UnsupportedError, UserError

from .deployment import codec_constants
from .flow import channels_of, evaluation, without_quantizers
from .record import check_calibrated, quantized_record, record_of

FORMATS = ('qcdq', 'qonnx', 'float')
OPSET = 17
METADATA_KEY = 'mm_sharp'  # of the constants, as JSON
# torch's newer exporter cannot store integer weights; before torch 2.5 there is none to choose.
_OLDER_EXPORTER: dict[str, Any] = {'dynamo': False} if 'dynamo' in signature(torch.onnx.export).parameters else {}


def has_stages(model: nn.Module) -> bool:
    """Whether a model's head puts out the heatmaps of several stages, of which MMPose predicts by the last (CPM, MSPN,
    RSN)."""
    return any(base.__name__ in ('CPMHead', 'MSPNHead') for base in type(getattr(model, 'head', None)).__mro__)


class Network(nn.Module):
    """What is exported: from the normalised picture to the outputs of the head of MMPose's top-down estimator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) float to the head's outputs."""
        outputs = self.model(inputs, None, mode='tensor')
        outputs = outputs[-1] if has_stages(self.model) else outputs
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def export_onnx(
    model: nn.Module, file: str | Path, file_format: str, constants: Mapping[str, Any], *, packed: bool = False
) -> Path:
    """Write a copy of a calibrated model as ONNX; returns the file.

    Args:
        model: Built with ``QuantizedModel``; ``'float'`` takes any.
        file: The ONNX file; folders are made. The constants go to the same name with ``.json``. Both are complete
            before they replace files of the same name.
        file_format: ``'qcdq'``, ``'qonnx'`` or ``'float'``.
        constants: Those of :mod:`mm_sharp.quantization.deployment`; format and names of the outputs are added.
        packed: Store weights of at most 4 bits in half a byte each (``'qcdq'`` only): :mod:`.packing`.

    Raises:
        ValueError: The format is unknown, or ``packed`` is given with another than ``'qcdq'``.
        UserError: The model is float or not calibrated, its outputs are not known, ONNX has no form of an operator,
            the graph cannot be rewritten, or there is nothing to pack.
    """
    check_exportable(model, file_format, packed=packed)
    if file_format != 'float':
        check_calibrated(model)
    import onnx

    from .packing import pack_weights

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix='.export-') as folder:
        written, sidecar = Path(folder, file.name), Path(folder, 'constants.json')
        outputs = _write(model, written, file_format)
        constants = {**constants, 'format': file_format, 'outputs': list(outputs)}
        graph = _rewritten(written, outputs, quantized_record(model).policy.target if file_format == 'qcdq' else '')
        if packed:
            graph = pack_weights(graph)
        graph.metadata_props.add(key=METADATA_KEY, value=json.dumps(constants, ensure_ascii=False))
        graph.producer_name, graph.producer_version = 'mm_sharp', constants.get('versions', {}).get('mm_sharp', '')
        onnx.checker.check_model(graph)
        onnx.save(graph, written)
        sidecar.write_text(json.dumps(constants, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(written, file)
        os.replace(sidecar, file.with_suffix('.json'))
    return file


def check_exportable(model: nn.Module, file_format: str, *, packed: bool = False) -> None:
    """Refuse what cannot be exported whatever the weights are, which need not be loaded; see :func:`export_onnx`.

    What ONNX has no form of only the export itself finds.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r} is not allowed: one of {', '.join(FORMATS)}, as format='qcdq'")
    if packed and file_format != 'qcdq':
        raise ValueError(f"packed=True is not allowed with format={file_format!r}: take format='qcdq'")
    record = record_of(model) if file_format == 'float' else quantized_record(model)
    if file_format == 'qcdq':
        _check_bits(model)
    if packed:
        from .packing import check_packable  # which needs onnx

        check_packable(model)
    uncalibrated = patch.object(record, 'calibrating', True) if record else nullcontext()
    with evaluation(model), without_quantizers(model), torch.no_grad(), uncalibrated:
        output_names(Network(model)(_zeros(model)))


def output_names(outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of a head's outputs; a UserError if they are not SimCC's, heatmaps or coordinates."""
    dimensions = tuple(output.ndim if isinstance(output, Tensor) else 0 for output in outputs)
    names = {(3, 3): ('simcc_x', 'simcc_y'), (4,): ('heatmaps',), (3,): ('keypoints',)}.get(dimensions)
    if names is None:
        shapes = [list(getattr(output, 'shape', [])) or type(output).__name__ for output in outputs]
        raise UserError(
            f"the head's outputs, {shapes}, are not known to the export: it takes heads with a pair of SimCC vectors "
            '(N, K, bins), with heatmaps (N, K, H, W) or with coordinates (N, K, 2 or more)'
        )
    return names


def warn_of_export(model: nn.Module) -> None:
    """Warn in one line, before a calibrated model is trained, that it cannot be exported afterwards, and why."""
    try:
        _check_bits(model)
        with tempfile.TemporaryDirectory() as folder:
            _write_float(Network(model), Path(folder, 'float.onnx'))
    except Exception as error:  # whatever it is, it must not end the training
        kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
        reason = kind + ' '.join(str(error).split())
        message = f'This model can be trained and tested, but tools/export.py will refuse it: {reason}'
        print_log(message, 'current', logging.WARNING)


@contextmanager
def _without_fastpath() -> Iterator[None]:
    """A context in which ``nn.MultiheadAttention`` runs by operators that ONNX has, and not by one of its own."""
    switch: Any = getattr(torch.backends, 'mha', None)  # before torch 2.3 there is none
    if switch is None:
        yield
        return
    before = switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(False)
    try:
        yield
    finally:
        switch.set_fastpath_enabled(before)


@contextmanager
def exporting() -> Iterator[None]:
    """A context for torch's exporter: sizes are constants, and its errors one line (an UnsupportedError)."""
    # With its log torch prints the whole graph when it fails; newer versions switch it on, and not off again.
    torch._C._jit_set_onnx_log_enabled(False)
    try:
        with (
            patch.object(torch._C, '_jit_set_onnx_log_enabled', lambda _: None),
            patch.object(F, 'adaptive_avg_pool2d', _pool),
            _without_fastpath(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter('ignore', TracerWarning)  # that sizes are constants
            warnings.simplefilter('ignore', DeprecationWarning)  # that the exporter is torch's older one
            yield
    except UserError:
        raise
    except Exception as error:
        layer = _layer(error)
        reason = ' '.join(str(error).partition('Please feel free')[0].split('\n')[0].split()).rstrip('. ')
        raise UnsupportedError(
            f'torch cannot write the network as ONNX: {layer and f"{layer}: "}{reason or type(error).__name__}'
        ) from error


def _write(model: nn.Module, file: Path, file_format: str) -> dict[str, list[int]]:
    from brevitas.export import export_onnx_qcdq, export_qonnx

    network = Network(deepcopy(model)).cpu().float().eval()
    if file_format == 'float':
        return _write_float(network, file)
    if file_format == 'qcdq':
        _set_biases_apart(network.model)
    return _write_with(export_onnx_qcdq if file_format == 'qcdq' else export_qonnx, network, file)


def _check_bits(model: nn.Module) -> None:
    """Refuse inputs of more than 8 bits in QCDQ."""
    wide = [layer for layer in quantized_record(model).quantized if layer.policy and layer.policy.act_bit_width > 8]
    if wide:
        raise UnsupportedError(
            f'{len(wide)} layers (the first is {wide[0].name}) have inputs of 16 bits, which QCDQ cannot write: '
            f'QuantizeLinear makes int16 from opset 21 on, and files are of opset {OPSET}. Take --format qonnx, or '
            'act_bit_width=8'
        )


def _write_float(network: Network, file: Path) -> dict[str, list[int]]:
    with evaluation(network), without_quantizers(network):
        return _write_with(torch.onnx.export, network, file)


@torch.no_grad()
def _write_with(export: Callable[..., Any], network: Network, file: Path) -> dict[str, list[int]]:
    """Have an exporter write a network; returns the outputs' shapes, by name."""
    inputs = _zeros(network.model)
    outputs = network(inputs)
    names = output_names(outputs)
    axes = {name: {0: 'batch'} for name in ('input', *names)}
    options = {'input_names': ['input'], 'output_names': list(names), 'dynamic_axes': axes, 'opset_version': OPSET}
    with exporting():
        export(network, (inputs,), str(file), **options, **_OLDER_EXPORTER)
    return {name: list(output.shape) for name, output in zip(names, outputs, strict=True)}


def _rewritten(file: Path, outputs: Mapping[str, Sequence[int]], target: str) -> Any:
    """The graph of a file as it is to be, for a policy's target or none; an UnsupportedError if that fails."""
    import onnx

    from .onnx_graph import tidy
    from .onnx_runtime import for_onnxruntime

    try:
        graph = tidy(onnx.load(file), outputs)
        if target == 'onnxruntime':
            graph = for_onnxruntime(graph)
        onnx.checker.check_model(graph)
    except Exception as error:
        reason = ' '.join(str(error).split()).rstrip('. ')
        raise UnsupportedError(
            f'the graph that torch has written cannot be rewritten{target and f" for the target {target!r}"}: '
            f'{type(error).__name__}: {reason}'
        ) from error
    return graph


def _set_biases_apart(model: nn.Module) -> None:
    """Have layers of fewer than 8 bits add their bias in a step of its own, in place.

    ONNX Runtime rounds the bias of a convolution in integers to a multiple of input scale times weight scale: coarse at
    4 bits, where it moved 14 % of the demo's keypoints by more than a pixel (0.1 % without); at 8 bits 2.6 % (0.6 %),
    for 1.7 to 3 times the speed. For its own target, biases stay where inputs have 8 bits, since with few bits of
    weights alone the layer is computed in integers, too.
    """
    record = quantized_record(model)
    for found in record.quantized:
        layer: Any = model.get_submodule(found.name)
        policy = found.policy
        if layer.bias is None or policy is None:
            continue
        bits = policy.act_bit_width, *([] if record.policy.target == 'onnxruntime' else [policy.weight_bit_width])
        if min(bits) < 8:
            # (C,) behind fully connected layers, (C, 1, 1) behind convolutions of pictures
            bias = layer.bias.detach().reshape(-1, *[1] * (layer.weight.ndim - 2))
            layer.bias = None
            # Before the hook that quantizes what the layer puts out.
            layer.register_forward_hook(lambda _, args, products, bias=bias: products + bias, prepend=True)


def _zeros(model: nn.Module) -> Tensor:
    """Two black pictures: with one, something in the graph might take the batch's size for the number 1."""
    width, height = codec_constants(model)['input_size']
    return torch.zeros(2, channels_of(model), height, width, device=next(model.parameters()).device)


def _pool(inputs: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """``adaptive_avg_pool2d`` with sizes that are known: a mean over windows, or a product."""
    sides = [int(side) for side in inputs.shape[-2:]]
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    target = [side if size is None else int(size) for side, size in zip(sides, wanted, strict=True)]
    if all(side % size == 0 for side, size in zip(sides, target, strict=True)):
        return F.avg_pool2d(inputs, [side // size for side, size in zip(sides, target, strict=True)])
    # (side, size): the shares that pixels have in the means of windows, as constants of the graph.
    rows, columns = (
        inputs.new_tensor(F.adaptive_avg_pool1d(torch.eye(side)[None], size)[0].tolist())
        for side, size in zip(sides, target, strict=True)
    )
    return rows.T @ inputs @ columns


def _layer(error: BaseException) -> str:
    """Name of the layer whose operator the exporter was at; '' if that is not known."""
    nodes = [frame.f_locals.get('node') for frame, _ in walk_tb(error.__traceback__)]
    scopes: list[str] = [node.scopeName() for node in nodes if isinstance(node, torch._C.Node)]
    names = re.findall(r'::([\w.]+)', scopes[-1]) if scopes else []
    return '.'.join(names[1:])  # the first is the model's in the network

"""What torch's exporter cannot write as ONNX: mended where sizes are known, else said in one line (ours).

The size of the picture is fixed, so what is derived from it (the size that LiteHRNet pools to) is a constant of the
graph, although the exporter takes it for a value. What remains is known before training: the network is exported once
in float, without its quantizers, which takes a few seconds.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional as F  # noqa: N812

from mm_sharp.errors import UnsupportedError, UserError

from .deployment import codec_constants
from .float_outputs import without_quantizers
from .flow import evaluation

OPSET = 17


def warn_of_export(model: nn.Module) -> None:
    """Say in one line, before a model is trained, that it cannot be exported afterwards, and why; else nothing.

    Args:
        model: A calibrated model; it is left as it was.
    """
    from .export import Network, output_names

    try:
        width, height = codec_constants(model)['input_size']
        inputs = torch.zeros(2, 3, height, width, device=next(model.parameters()).device)
        network = Network(model)
        with evaluation(model), without_quantizers(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            output_names(network(inputs))
            with exporting():
                file = str(Path(folder, 'float.onnx'))
                torch.onnx.export(network, (inputs,), file, opset_version=OPSET, dynamo=False)
    except UserError as error:
        message = f'This model can be trained and tested, but tools/export.py will refuse it: {error}'
        print_log(message, logger='current', level=logging.WARNING)


@contextmanager
def exporting() -> Iterator[None]:
    """A context for torch's exporter: sizes are constants, and its errors one line.

    Raises:
        UnsupportedError: The network cannot be written as ONNX.
    """
    pool, log = F.adaptive_avg_pool2d, torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *args: None  # it prints the whole graph when it fails
    F.adaptive_avg_pool2d = _pool  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
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
    finally:
        F.adaptive_avg_pool2d = pool
        torch._C._jit_onnx_log = log


def _pool(inputs: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """``adaptive_avg_pool2d`` with sizes that are known: a mean over everything, over windows, or a product."""
    sides = [int(side) for side in inputs.shape[-2:]]
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    target = [side if size is None else int(size) for side, size in zip(sides, wanted, strict=True)]
    if target == [1, 1]:
        return inputs.mean((-2, -1), keepdim=True)
    if all(side % size == 0 for side, size in zip(sides, target, strict=True)):
        return F.avg_pool2d(inputs, [side // size for side, size in zip(sides, target, strict=True)])
    rows, columns = (_windows(side, size).to(inputs) for side, size in zip(sides, target, strict=True))
    return rows @ inputs @ columns.T


def _windows(side: int, size: int) -> Tensor:
    """(size, side): the shares that pixels have in the means of windows, which overlap if need be."""
    shares = torch.zeros(size, side)
    for i in range(size):
        start, end = i * side // size, -(-(i + 1) * side // size)
        shares[i, start:end] = 1 / (end - start)
    return shares


def _layer(error: BaseException) -> str:
    """Name of the layer whose operator the exporter was at; '' if that is not known."""
    nodes = [frame.f_locals.get('node') for frame, _ in walk_tb(error.__traceback__)]
    scopes: list[Any] = [node.scopeName() for node in nodes if isinstance(node, torch._C.Node)]
    names = re.findall(r'::([\w.]+)', scopes[-1]) if scopes else []
    return '.'.join(names[1:])  # the first is the model's in the network

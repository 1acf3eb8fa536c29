"""Stand-ins in plain torch for the compiled operators of MMCV that training calls, so that more models can be tried.

What they compute is a detector's usual arithmetic; whether a step is repeated faithfully does not depend on it.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def install() -> None:
    """Put the stand-ins in the place of MMCV's operators, in this process."""
    # The package has functions of the modules' names.
    vars(importlib.import_module('mmcv.ops.nms'))['ext_module'].nms = _nms
    vars(importlib.import_module('mmcv.ops.masked_conv'))['MaskedConv2d'].forward = _masked_conv
    for module, kind, function in (
        ('roi_align', 'RoIAlignFunction', _roi_align),
        ('deform_conv', 'DeformConv2dFunction', _deform_conv),
        ('modulated_deform_conv', 'ModulatedDeformConv2dFunction', _modulated_deform_conv),
    ):
        operator = vars(importlib.import_module(f'mmcv.ops.{module}'))[kind]
        operator.forward, operator.backward = _differentiable(function)


def _differentiable(function: Any) -> tuple[staticmethod[Any, Any], staticmethod[Any, Any]]:
    """``forward`` and ``backward`` of an autograd function that runs ``function`` again for its gradients."""

    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.args = args
        return function(*args).clone()  # type: ignore[no-any-return]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        args = [
            a.detach().requires_grad_() if need else a for a, need in zip(ctx.args, ctx.needs_input_grad, strict=True)
        ]
        with torch.enable_grad():
            output = function(*args)
        needed = [a for a, need in zip(args, ctx.needs_input_grad, strict=True) if need]
        found = iter(torch.autograd.grad(output, needed, gradient, allow_unused=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad)

    return staticmethod(forward), staticmethod(backward)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that are kept, (k,), by falling score."""
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].double().numpy().T
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    alive, kept = np.ones(len(order), dtype=bool), []
    for i in range(len(order)):
        if alive[i]:
            kept.append(i)
            width = np.minimum(x2[i], x2[i:]) - np.maximum(x1[i], x1[i:]) + offset
            height = np.minimum(y2[i], y2[i:]) - np.maximum(y1[i], y1[i:]) + offset
            common = width.clip(0) * height.clip(0)
            alive[i:] &= common <= iou_threshold * (area[i] + area[i:] - common)
    return order[kept]


def _roi_align(features: Tensor, rois: Tensor, size: Any, scale: float, *_: Any) -> Tensor:
    """One point in each bin: features (N, C, H, W), rois (k, 5) as index, x1, y1, x2, y2; gives (k, C, h, w)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    x1, y1, x2, y2 = (rois[:, 1:] * scale - 0.5).T
    ys = y1[:, None] + (y2 - y1)[:, None] * (torch.arange(height) + 0.5) / height
    xs = x1[:, None] + (x2 - x1)[:, None] * (torch.arange(width) + 0.5) / width
    points = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), dim=-1)
    output = features.new_zeros((len(rois), features.shape[1], height, width))
    for number in range(len(features)):
        inside = rois[:, 0] == number
        values = _sample(features[number : number + 1], points[inside].reshape(1, -1, width, 2))[0]
        output[inside] = values.unflatten(1, (-1, height)).transpose(0, 1)
    return output


def _sample(features: Tensor, points: Tensor) -> Tensor:
    """Values between pixels, zero outside: features (N, C, H, W), points (N, h, w, 2) as x, y in pixels."""
    extent = points.new_tensor([features.shape[3], features.shape[2]])
    return F.grid_sample(features, (2 * points + 1) / extent - 1, align_corners=False)


def _deform_conv(
    inputs: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    deform_groups: int,
    *_: Any,
) -> Tensor:
    return _deformed(inputs, offset, None, weight, None, stride, padding, dilation, groups, deform_groups)


def _modulated_deform_conv(
    inputs: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    deform_groups: int,
) -> Tensor:
    return _deformed(inputs, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups)


def _deformed(
    inputs: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    deform_groups: int,
) -> Tensor:
    """A convolution whose taps are displaced: offset (N, 2 G k k, h, w) as y, x; mask (N, G k k, h, w)."""
    (sy, sx), (py, px), (dy, dx) = (n if isinstance(n, tuple) else (n, n) for n in (stride, padding, dilation))
    (count, _, height, width), (ky, kx) = offset.shape, weight.shape[2:]
    offset = offset.reshape(count, deform_groups, ky * kx, 2, height, width)
    columns = []
    for group, part in enumerate(inputs.chunk(deform_groups, dim=1)):
        taps = []
        for tap in range(ky * kx):
            ys = torch.arange(height)[:, None] * sy - py + tap // kx * dy + offset[:, group, tap, 0]
            xs = torch.arange(width)[None] * sx - px + tap % kx * dx + offset[:, group, tap, 1]
            taps.append(_sample(part, torch.stack([xs, ys], dim=-1)))
            if mask is not None:
                taps[-1] = taps[-1] * mask[:, group * ky * kx + tap, None]
        columns.append(torch.stack(taps, dim=2))
    column = torch.cat(columns, dim=1).reshape(count, groups, -1, height * width)
    kernel = weight.reshape(groups, weight.shape[0] // groups, -1)
    output = torch.einsum('gok,ngkp->ngop', kernel, column).reshape(count, -1, height, width)
    return output if bias is None else output + bias[:, None, None]


def _masked_conv(module: Any, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masks are for inference: everywhere else the convolution is a plain one."""
    return F.conv2d(inputs, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)

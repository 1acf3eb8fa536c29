"""What a program needs around an exported model: how to make its input, and what its outputs mean (ours).

An ONNX file holds the network alone. The crop of a person, the normalisation and the decoding of the outputs stay
outside, and each has constants. They are collected from the model, its config and its data set, as plain values that
JSON can hold, and travel in the file's metadata and beside it (:mod:`mm_sharp.quantization.export`); ``docs/export.md``
explains every key.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from re import Pattern
from typing import Any

import numpy as np
import torch
from torch import nn

from mm_sharp.errors import UserError

VERSION = 1
_PACKAGES = ('mm_sharp', 'brevitas', 'torch', 'onnx', 'mmpose', 'mmengine')


def deployment_constants(
    model: nn.Module, pipeline: Sequence[Mapping[str, Any]], dataset_meta: Mapping[str, Any], name: str = ''
) -> dict[str, Any]:
    """Collect everything that turns a picture and a box into the model's input, and its outputs into keypoints.

    Args:
        model: A top-down pose estimator of MMPose's; quantized or not.
        pipeline: The config's test pipeline.
        dataset_meta: Its data set's ``metainfo``: names, links and colours of keypoints.
        name: What to call the model, as its config's name.

    Returns:
        Plain values; see ``docs/export.md``.

    Raises:
        UserError: The model has no codec, or the pipeline does not crop people as MMPose's top-down recipes do.
    """
    codec = codec_constants(model)
    return {
        'version': VERSION,
        'name': name,
        'input': {'name': 'input', **_normalisation(model, codec)},
        'crop': _crop(pipeline),
        'codec': codec,
        'head': type(model.head).__name__,
        'keypoints': _keypoints(dataset_meta),
        'output_keypoint_indices': plain(_test_setting(model, 'output_keypoint_indices')),
        'flip_test': bool(_test_setting(model, 'flip_test')),
        'quantization': plain(getattr(getattr(model, 'quantization', None), 'policy', None)),
        'versions': versions(),
    }


def codec_constants(model: nn.Module) -> dict[str, Any]:
    """The codec of a model's head: its type, and its arguments with their defaults filled in.

    Raises:
        UserError: The model is no top-down estimator, or its head has no codec that knows its input's size.
    """
    codec = getattr(getattr(model, 'head', None), 'decoder', None)
    if type(model).__name__ != 'TopdownPoseEstimator' or not hasattr(codec, 'input_size'):
        head = type(model.head).__name__ if hasattr(model, 'head') else 'none'
        raise UserError(
            f'model={type(model).__name__} (head: {head}) cannot be exported: a TopdownPoseEstimator whose head has a '
            "codec can be, as dict(type='TopdownPoseEstimator', head=dict(…, decoder=codec), …)"
        )
    names = [name for name in signature(type(codec)).parameters if hasattr(codec, name)]
    return {'type': type(codec).__name__, **{name: plain(getattr(codec, name)) for name in names}}


def plain(value: Any) -> Any:
    """A value in types that JSON has: numbers, text, lists, dicts; patterns as text, dataclasses as dicts.

    Anything else becomes the text that Python shows for it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value.pattern if isinstance(value, Pattern) else str(value)


def versions() -> dict[str, str]:
    """Versions of what made the file; a package that is not installed as one is left out."""
    found = {'python': platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _normalisation(model: Any, codec: Mapping[str, Any]) -> dict[str, Any]:
    """Size, channel order, mean and standard deviation of what the network takes in."""
    width, height = codec['input_size']
    preprocessor = model.data_preprocessor
    normalized = getattr(preprocessor, '_enable_normalize', False)
    return {
        'width': int(width),
        'height': int(height),
        # Pictures are read as BGR; the preprocessor turns their channels round or leaves them.
        'channels': 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr',
        'mean': _shortest(preprocessor.mean) if normalized else [0.0] * 3,
        'std': _shortest(preprocessor.std) if normalized else [1.0] * 3,
    }


def _shortest(values: torch.Tensor) -> list[float]:
    """Numbers in float32 as they were written in the config: 123.675, not 123.67500305175781."""
    return [float(str(value)) for value in values.flatten().cpu().numpy()]


def _crop(pipeline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How a box becomes the input's picture.

    Raises:
        UserError: The pipeline lacks one of the two steps that do it.
    """
    steps = {_name(step): step for step in pipeline}
    missing = [name for name in ('GetBBoxCenterScale', 'TopdownAffine') if name not in steps]
    if missing:
        raise UserError(
            f'the test pipeline has no {" and no ".join(missing)}, so how it makes the input from a person is not '
            'known: only top-down recipes can be exported, whose pipeline has both'
        )
    return {
        'padding': float(steps['GetBBoxCenterScale'].get('padding', 1.25)),
        'udp': bool(steps['TopdownAffine'].get('use_udp', False)),
    }


def _keypoints(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Names, links and colours (RGB) of keypoints."""
    names = meta.get('keypoint_id2name') or {}
    return {
        'dataset': meta.get('dataset_name'),
        'names': [names[i] for i in sorted(names)],
        'colors': plain(meta.get('keypoint_colors')),
        'skeleton': plain(meta.get('skeleton_links')),
        'skeleton_colors': plain(meta.get('skeleton_link_colors')),
        'flip_indices': plain(meta.get('flip_indices')),
    }


def _test_setting(model: Any, name: str) -> Any:
    return (getattr(model, 'test_cfg', None) or {}).get(name)


def _name(step: Mapping[str, Any]) -> str:
    """A pipeline step's type, without its scope; in new-style configs it is a class."""
    kind = step['type']
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]

"""The constants around an exported model: how to make its input, and what its outputs mean (``docs/export.md``)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from re import Pattern
from typing import Any

from torch import nn

from mm_sharp.errors import UserError

from .flow import channels_of

VERSION = 1
_PACKAGES = ('mm_sharp', 'brevitas', 'torch', 'onnx', 'mmpose', 'mmengine')


def deployment_constants(
    model: nn.Module, pipeline: Sequence[Mapping[str, Any]], dataset_meta: Mapping[str, Any], name: str = ''
) -> dict[str, Any]:
    """The constants of MMPose's top-down estimator, quantized or not, as plain values that JSON can hold.

    ``pipeline`` is the config's test pipeline, ``dataset_meta`` the ``metainfo`` of its data set.
    """
    codec = codec_constants(model)
    settings = getattr(model, 'test_cfg', None) or {}
    found = {
        'version': VERSION,
        'name': name,
        'input': {'name': 'input', **_normalisation(model, codec)},
        'crop': crop_constants(pipeline),
        'codec': codec,
        'head': type(model.head).__name__,
        'keypoints': _keypoints(dataset_meta),
        'output_keypoint_indices': settings.get('output_keypoint_indices'),
        'flip_test': bool(settings.get('flip_test')),
        'quantization': getattr(getattr(model, 'quantization', None), 'policy', None),
        'versions': _versions(),
    }
    return {key: plain(value) for key, value in found.items()}


def codec_constants(model: nn.Module) -> dict[str, Any]:
    """The codec of a model's head: its type, and its arguments with their defaults filled in."""
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
    """A value in types that JSON has. What has no form there becomes the text that Python shows for it."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, 'tolist'):  # arrays, tensors and numpy's numbers
        return value.tolist()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value.pattern if isinstance(value, Pattern) else str(value)


def _versions() -> dict[str, str]:
    """Versions of what made the file. A package that is not installed as one is left out."""
    found = {'python': platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _normalisation(model: Any, codec: Mapping[str, Any]) -> dict[str, Any]:
    preprocessor, count = model.data_preprocessor, channels_of(model)
    found = {'mean': [0.0] * count, 'std': [1.0] * count}
    if getattr(preprocessor, '_enable_normalize', False):
        # Numbers in float32 as they were written in the config: 123.675, not 123.67500305175781.
        found = {n: [float(str(x)) for x in getattr(preprocessor, n).flatten().cpu().numpy()] for n in found}
    size = dict(zip(('width', 'height'), map(int, codec['input_size']), strict=True))
    # Pictures are read as BGR; the preprocessor may reverse their channels.
    channels = 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr'
    return {**size, 'channels': 'gray' if count == 1 else channels, **found}


def crop_constants(pipeline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How a person's box becomes the input's picture; a UserError if the test pipeline is not a top-down one."""
    # In new-style configs a type is a class.
    kinds = [getattr(step['type'], '__name__', str(step['type']).rpartition('.')[2]) for step in pipeline]
    steps = dict(zip(kinds, pipeline, strict=True))
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
    names = meta.get('keypoint_id2name') or {}
    keys = {'dataset': 'dataset_name', 'colors': 'keypoint_colors', 'skeleton': 'skeleton_links'}
    keys |= {'skeleton_colors': 'skeleton_link_colors', 'flip_indices': 'flip_indices'}
    return {'names': [names[i] for i in sorted(names)], **{ours: meta.get(theirs) for ours, theirs in keys.items()}}

"""Recipes' networks made narrow and shallow: the same classes, losses and labels, in a fraction of the time.

What a head's losses are, which samples a pass gets and what a wrapper leaves behind do not depend on a network's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_CHANNELS = 8


def narrow(model: Any) -> None:
    """Make the network of a recipe's ``model`` narrow, in place, where its backbone is one of :data:`NARROW`."""
    kind = model.get('backbone', {}).get('type')
    if kind in NARROW:
        NARROW[kind](model)


def _heads(model: Any, channels: int) -> None:
    """Tell a head, and those in it, what the backbone delivers."""
    head = model['head']
    if 'in_channels' in head:
        head['in_channels'] = channels
    for inner in ('pose_cfg', 'keypoint_head_cfg', 'root_head_cfg', 'hand_type_head_cfg'):
        if inner in head:
            head[inner]['in_channels'] = channels
            _hidden(head[inner], inner)
    _hidden(head, head['type'])


def _hidden(head: Any, kind: str) -> None:
    """Few channels within a head; None and () stand for no deconvolutions."""
    if 'hidden_dims' in head:
        head['hidden_dims'] = (2 * _CHANNELS,)
    deconvolves = kind in ('HeatmapHead', 'DSNTHead', 'IntegralRegressionHead', 'SimCCHead', 'pose_cfg')
    if head.get('deconv_out_channels', (256,) if deconvolves else None):
        head['deconv_out_channels'] = (_CHANNELS,) * 3
    if 'gau_cfg' in head:
        head['gau_cfg'].update(hidden_dims=32, s=16)


def _resnet(model: Any) -> None:
    model['backbone'].update(depth=18, stem_channels=_CHANNELS, base_channels=_CHANNELS)
    _heads(model, 8 * _CHANNELS)


def _mobilenet(model: Any) -> None:
    model['backbone']['widen_factor'] = 0.25
    _heads(model, 1280)


def _hrnet(model: Any) -> None:
    """One module of one block a stage, with half of the width again at every branch."""
    for number, stage in enumerate(model['backbone']['extra'].values()):
        stage.update(num_modules=1, num_blocks=(1,) * stage['num_branches'])
        stage['num_channels'] = tuple(_CHANNELS * 2**i for i in range(stage['num_branches'])) if number else (16,)
    concatenated = model.get('neck', {}).get('concat', False)
    _heads(model, 15 * _CHANNELS if concatenated else _CHANNELS)


def _hrformer(model: Any) -> None:
    """One module a stage. Blocks are dropped more often, for there are fewer of them."""
    extra = model['backbone']['extra']
    extra['drop_path_rate'] = 0.3
    for name in ('stage2', 'stage3', 'stage4'):
        stage = extra[name]
        stage.update(num_modules=1, num_channels=tuple(channels // 4 for channels in stage['num_channels']))
    _heads(model, extra['stage4']['num_channels'][0])


def _lite_hrnet(model: Any) -> None:
    model['backbone']['extra']['stages_spec']['num_modules'] = (1, 1, 1)


def _cpm(model: Any) -> None:
    """Three of six stages; its stem has the same width always."""
    model['backbone'].update(num_stages=3, feat_channels=_CHANNELS)
    model['head']['num_stages'] = 3


def _rsn(model: Any) -> None:
    model['backbone'].update(unit_channels=16, num_blocks=[1, 1, 1, 1], expand_times=4)
    model['head']['unit_channels'] = 16


def _cspnext(model: Any) -> None:
    model['backbone'].update(widen_factor=0.125, deepen_factor=0.167)
    if 'neck' in model:
        model['neck'].update(in_channels=[32, 64, 128], num_csp_blocks=1)
    _heads(model, 128)


def _dstformer(model: Any) -> None:
    model['backbone'].update(depth=2, feat_size=32, num_heads=4)
    model['head'].update(in_channels=32, embedding_size=32)


def _tcn(model: Any) -> None:
    for part in ('backbone', 'traj_backbone'):
        if part in model:
            model[part]['stem_channels'] = 32
    for part in ('head', 'traj_head'):
        if part in model:
            model[part]['in_channels'] = 32


NARROW: dict[str, Callable[[Any], None]] = {
    'ResNet': _resnet,
    'MobileNetV2': _mobilenet,
    'HRNet': _hrnet,
    'HRFormer': _hrformer,
    'LiteHRNet': _lite_hrnet,
    'CPM': _cpm,
    'RSN': _rsn,
    'CSPNeXt': _cspnext,
    'DSTFormer': _dstformer,
    'TCN': _tcn,
}

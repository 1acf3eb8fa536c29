"""The backbones that MMPose ships, and some of timm's and MMPretrain's, each in a small pose estimator.

A backbone has the smallest of MMPose's top-down recipes with it, or takes the place of MobileNetV2's in that one's.
"""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from tests.narrow import narrow
from tests.sweep.recipes import Recipe

_COCO = 'body_2d_keypoint/topdown_heatmap/coco/td-hm_{}.py'
_OTHERS = _COCO.format('mobilenetv2_8xb64-210e_coco-256x192')
SIZE = (64, 64)
# By key: how many pixels of a picture one pixel there is.
_SIZES = {'input_size': 1, 'img_size': 1, 'image_size': 1, 'heatmap_size': 4, 'out_shape': 4}
# A recipe's path, or a backbone and the channels of its last features.
Source = str | tuple[dict[str, Any], int]


def _coco(name: str) -> str:
    return _COCO.format(f'{name}_coco-256x192')


def _timm(name: str, channels: int) -> Source:
    return dict(type='mmpretrain.TIMMBackbone', model_name=name, features_only=True, out_indices=(4,)), channels


BACKBONES: dict[str, Source] = {
    'AlexNet': _coco('alexnet_8xb64-210e'),
    'CPM': _coco('cpm_8xb64-210e'),
    'CSPDarknet': (dict(type='CSPDarknet', widen_factor=0.25, out_indices=(4,)), 256),
    'CSPNeXt': 'body_2d_keypoint/topdown_heatmap/coco/cspnext-tiny_udp_8xb256-210e_coco-256x192.py',
    'DSTFormer': 'body_3d_keypoint/motionbert/h36m/motionbert_dstformer-243frm_8xb32-240e_h36m.py',
    'HRFormer': _coco('hrformer-small_8xb32-210e'),
    'HRNet': _coco('hrnet-w32_8xb64-210e'),
    'HourglassAENet': (
        dict(type='HourglassAENet', stage_channels=(32, 48, 64, 80, 96), feat_channels=32, num_stacks=1),
        34,
    ),
    'HourglassNet': _COCO.format('hourglass52_8xb32-210e_coco-256x256'),
    'LiteHRNet': _coco('litehrnet-18_8xb64-210e'),
    'MSPN': _coco('mspn50_8xb32-210e'),
    'MobileNetV2': _OTHERS,
    'MobileNetV3': (dict(type='MobileNetV3'), 96),
    'PyramidVisionTransformer': _coco('pvt-s_8xb64-210e'),
    'PyramidVisionTransformerV2': _coco('pvtv2-b2_8xb64-210e'),
    'RSN': _coco('rsn18_8xb32-210e'),
    'RegNet': (dict(type='RegNet', arch='regnetx_400mf'), 384),
    'ResNeSt': _coco('resnest50_8xb64-210e'),
    'ResNeXt': _coco('resnext50_8xb64-210e'),
    'ResNet': _coco('res50_8xb64-210e'),
    'ResNetV1d': _coco('resnetv1d50_8xb64-210e'),
    'SCNet': _coco('scnet50_8xb64-210e'),
    'SEResNeXt': (dict(type='SEResNeXt', depth=50), 2048),
    'SEResNet': _coco('seresnet50_8xb64-210e'),
    'ShuffleNetV1': _coco('shufflenetv1_8xb64-210e'),
    'ShuffleNetV2': _coco('shufflenetv2_8xb64-210e'),
    'SwinTransformer': _coco('swin-t-p4-w7_8xb32-210e'),
    'TCN': 'body_3d_keypoint/image_pose_lift/h36m/image-pose-lift_tcn_8xb64-200e_h36m.py',
    'V2VNet': (dict(type='V2VNet', input_channels=3, output_channels=17), 17),
    'VGG': _coco('vgg16-bn_8xb64-210e'),
    'VGG, without BatchNorm': (dict(type='VGG', depth=11), 512),
    'ViPNAS_MobileNetV3': _coco('vipnas-mbv3_8xb64-210e'),
    'ViPNAS_ResNet': _coco('vipnas-res50_8xb64-210e'),
    'mmpretrain.VisionTransformer (ViTPose)': _coco('ViTPose-small_8xb64-210e'),
    'timm: efficientnet_lite0': _timm('efficientnet_lite0', 320),
    'timm: mobilenetv3_small_050': _timm('mobilenetv3_small_050', 288),
    'timm: resnet18': _timm('resnet18', 512),
    'timm: regnetx_002': _timm('regnetx_002', 368),
    'timm: convnext_atto': (
        dict(type='mmpretrain.TIMMBackbone', model_name='convnext_atto', features_only=True, out_indices=(3,)),
        320,
    ),
}


def config(name: str) -> Config:
    """The config of a narrow estimator with a backbone, for pictures of :data:`SIZE`, with nothing to download."""
    source = BACKBONES[name]
    cfg = Recipe('mmpose', source if isinstance(source, str) else _OTHERS).config()
    if not isinstance(source, str):
        backbone, cfg.model.head.in_channels = source
        cfg.model.backbone = Config({'backbone': backbone}).backbone
    if name == 'HourglassAENet':
        cfg.model.head.deconv_out_channels = None  # its features are as large as heatmaps
    narrow(cfg.model)
    _resize(cfg.model)
    return cfg


def _resize(part: Any) -> None:
    """Set all sizes of pictures and heatmaps in a model's config, in place."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in _SIZES and isinstance(value, (tuple, list)):
                part[key] = SIZE if _SIZES[key] == 1 else tuple(side // _SIZES[key] for side in SIZE)
            else:
                _resize(value)

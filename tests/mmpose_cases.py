"""MMPose's shipped configs, one for each head, and a synthetic batch for every one of them.

Batches go through each config's own codec and packing, so heads get exactly the labels that they get in training.
To save time, the networks are narrow (see :mod:`tests.narrow`) and, where a head allows it, the input is smaller than
the recipe's; nothing else of a model is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mmpose
import numpy as np
import pytest
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmpose.registry import MODELS, TRANSFORMS
from torch import nn

from tests.narrow import narrow

RECIPES = Path(mmpose.__file__).parent / '.mim' / 'configs'
BATCH = 2
# The steps of a pipeline that make labels; the others load and augment real pictures.
_LABELLING = ('GetBBoxCenterScale', 'TopdownAffine', 'GenerateTarget', 'BottomupGetHeatmapMask', 'PackPoseInputs')


@dataclass(frozen=True)
class Case:
    """One of MMPose's configs.

    Args:
        name: Head, and what else is special.
        path: The config, below MMPose's ``configs/``.
        size: Input width and height in pixels, where they differ from the recipe's.
        stride: Input pixels a heatmap pixel; needed with ``size`` for heatmaps.
        keypoints: Keypoints of a person.
        people: People in a picture.
        edit: Changes the config before the model is built.
        sample: Makes a sample instead of :func:`person_sample`.
    """

    name: str
    path: str
    size: tuple[int, int] | None = None
    stride: int | None = 4
    keypoints: int = 17
    people: int = 1
    edit: Callable[[Config], None] = field(default=lambda cfg: None)
    sample: Callable[[Case, int], dict[str, Any]] | None = None

    def config(self) -> Config:
        """The recipe with a narrow network, without pretrained weights (nothing is downloaded)."""
        cfg = Config.fromfile(RECIPES / self.path)
        narrow(cfg.model)
        self.edit(cfg)
        without_pretrained(cfg._cfg_dict)
        return cfg

    def batch(self, cfg: Config) -> dict[str, Any]:
        """A batch as the recipe's data loader collates it."""
        steps = [dict(step) for step in _pipeline(cfg) if step['type'] in _LABELLING]
        for step in steps:
            if 'encoder' in step and self.size is not None:
                encoders = step['encoder'] if isinstance(step['encoder'], list) else [step['encoder']]
                for encoder in encoders:
                    self._resize(encoder)
            if step['type'] == 'TopdownAffine' and self.size is not None:
                step['input_size'] = self.size
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        make = self.sample or person_sample
        return pseudo_collate([pipeline(make(self, i)) for i in range(BATCH)])  # type: ignore[no-any-return]

    def _resize(self, encoder: dict[str, Any]) -> None:
        assert self.size is not None
        if 'input_size' in encoder:
            encoder['input_size'] = self.size
        if self.stride is not None and 'heatmap_size' in encoder:
            encoder['heatmap_size'] = tuple(side // self.stride for side in self.size)


def without_pretrained(cfg: Any) -> None:
    """Remove pretrained weights from a config, at any depth, in place."""
    if isinstance(cfg, Mapping):
        if isinstance(cfg.get('init_cfg'), Mapping) and cfg['init_cfg'].get('type') == 'Pretrained':
            cfg['init_cfg'] = None  # type: ignore[index]
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for item in cfg:
            without_pretrained(item)


def build(cfg: Config) -> nn.Module:
    """The model, in training mode."""
    return MODELS.build(cfg.model).train()  # type: ignore[no-any-return]


def person_sample(case: Case, number: int) -> dict[str, Any]:
    """A picture of noise with random keypoints, as a 2-D data set of MMPose's hands it to its pipeline."""
    rng = np.random.default_rng(number)
    width, height = case.size or (192, 256)
    count, points = case.people, case.keypoints
    box = np.array([[0.05 * width, 0.05 * height, 0.95 * width, 0.95 * height]] * count, dtype=np.float32)
    return {
        'img': rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        'img_shape': (height, width),
        'ori_shape': (height, width),
        'input_size': (width, height),
        'img_path': f'{number}.png',
        'id': number,
        'img_id': number,
        'bbox': box,
        'bbox_score': np.ones(count, dtype=np.float32),
        'bbox_labels': np.zeros(count, dtype=np.int64),
        'category_id': np.ones(count, dtype=np.int64),
        'area': np.full(count, 0.8 * width * height, dtype=np.float32),
        'keypoints': rng.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height), (count, points, 2)).astype(
            np.float32
        ),
        'keypoints_visible': np.ones((count, points), dtype=np.float32),
        'dataset_keypoint_weights': np.ones(points, dtype=np.float32),
        'flip_indices': list(range(points)),
        'upper_body_ids': list(range(points // 2)),
        'lower_body_ids': list(range(points // 2, points)),
        'skeleton_links': [],
        'invalid_segs': [],
        'dataset_name': 'synthetic',
    }


def crowd_sample(case: Case, number: int) -> dict[str, Any]:
    """The same after bottom-up augmentation by nothing: a warp, and boxes as their four corners."""
    sample = person_sample(case, number)
    x1, y1, x2, y2 = sample['bbox'].T
    corners = np.stack([x1, y1, x1, y2, x2, y1, x2, y2], axis=1).reshape(-1, 4, 2)
    return {**sample, 'bbox': corners, 'warp_mat': np.eye(2, 3)}


def grouped_sample(case: Case, number: int) -> dict[str, Any]:
    """The same, with the labels that associative embedding's codec makes and MMPose 1.3 forgets to pack."""
    labels = {'keypoint_indices': 'keypoint_indices', 'keypoint_weights': 'keypoint_weights'}
    return {**crowd_sample(case, number), 'label_mapping_table': labels}


def hands_sample(case: Case, number: int) -> dict[str, Any]:
    """Two hands in 3-D, as InterHand."""
    sample = person_sample(case, number)
    depth = np.random.default_rng(number).uniform(-50, 50, (1, case.keypoints, 1)).astype(np.float32)
    width, height = sample['input_size']
    return {
        **sample,
        'keypoints': np.concatenate([sample['keypoints'], depth], axis=-1),
        'rel_root_depth': np.float32(10),
        'rel_root_valid': np.float32(1),
        'abs_depth': np.ones(2, dtype=np.float32),
        'hand_type': np.array([[1, 0]], dtype=np.float32),
        'hand_type_valid': np.ones(1, dtype=np.float32),
        'focal': np.full(2, 500, dtype=np.float32),
        'principal_pt': np.array([width / 2, height / 2], dtype=np.float32),
        'rotation': 0,
    }


def motion_sample(frames: int, targets: int) -> Callable[[Case, int], dict[str, Any]]:
    """A sequence of 2-D poses and their 3-D targets, as Human3.6M."""

    def make(case: Case, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        target = rng.normal(loc=(0, 0, 5), size=(targets, 17, 3))  # 5 m before the camera
        return {
            'keypoints': rng.uniform(0, 1000, (frames, 17, 2)).astype(np.float32),
            'keypoints_visible': np.ones((frames, 17), dtype=np.float32),
            'lifting_target': target.astype(np.float32),
            'lifting_target_visible': np.ones((targets, 17), dtype=np.float32),
            'camera_param': {'w': 1000, 'h': 1000},
            'factor': np.ones(targets, dtype=np.float32),
            'flip_indices': list(range(17)),
            'id': number,
            'category_id': 1,
            'target_img_path': f'{number}.png',
        }

    return make


def _pipeline(cfg: Config) -> list[dict[str, Any]]:
    dataset = cfg.train_dataloader.dataset
    while not dataset.get('pipeline'):
        dataset = dataset.dataset
    return dataset.pipeline  # type: ignore[no-any-return]


def _dsnt(cfg: Config) -> None:
    """The head knows the feature map's size: the input's / 32."""
    cfg.model.head.in_featuremap_size = (2, 2)


def _integral(cfg: Config) -> None:
    """No recipe has the plain integral head; DSNT's is a subclass of it with a second loss."""
    _dsnt(cfg)
    cfg.model.head.type = 'IntegralRegressionHead'
    cfg.model.head.pop('lambda_t', None)
    cfg.model.head.loss = {'type': 'SmoothL1Loss', 'use_target_weight': True}


def _ae(cfg: Config) -> None:
    """The recipe's training pipeline is empty."""
    cfg.train_dataloader.dataset.pipeline = [
        {'type': 'GenerateTarget', 'encoder': cfg.codec},
        {'type': 'BottomupGetHeatmapMask'},
        {'type': 'PackPoseInputs'},
    ]


def _trajectory(cfg: Config) -> None:
    """The recipe has no training data, and a semi-supervised loss that MMPose's own parse_losses refuses."""
    cfg.model.pop('semi_loss')
    cfg.train_dataloader = {'dataset': {'pipeline': cfg.val_pipeline}}
    cfg.optim_wrapper = {'optimizer': {'type': 'Adam', 'lr': 1e-3}}


def _distiller(cfg: Config) -> None:
    """Its teacher's and student's configs are files, which are written anew with networks that are narrow too."""
    for who, width in (('teacher', 0.25), ('student', 0.125)):
        part = Config.fromfile(RECIPES.parent / cfg.model[f'{who}_cfg'])
        narrow(part.model)
        part.model.backbone.widen_factor = width
        part.model.head.in_channels = cfg.model.distill_cfg[0].methods[0][f'{who}_channels'] = int(1024 * width)
        without_pretrained(part._cfg_dict)
        file = Path(_folder().name) / f'{who}.py'
        part.dump(file)
        cfg.model[f'{who}_cfg'] = str(file)
    cfg.model.teacher_pretrained = None


@functools.cache
def _folder() -> TemporaryDirectory[str]:
    """Of configs that must be files; it goes with the process."""
    return TemporaryDirectory()


def _hands(cfg: Config) -> None:
    """A smaller volume: 3-D heatmaps at the recipe's size take seconds a step."""
    cfg.train_dataloader.dataset.pipeline[5].encoder.update(image_size=[64, 64], heatmap_size=[16, 16, 64])


_BODY = 'body_2d_keypoint'
_HEATMAP = f'{_BODY}/topdown_heatmap/coco'
_LIFT = 'body_3d_keypoint'
_SMALL = (64, 64)

CASES = (
    Case('HeatmapHead', f'{_HEATMAP}/td-hm_mobilenetv2_8xb64-210e_coco-256x192.py', _SMALL),
    Case('HeatmapHead-HRNet', f'{_HEATMAP}/td-hm_litehrnet-18_8xb64-210e_coco-256x192.py', _SMALL),
    Case('HeatmapHead-DropPath', f'{_HEATMAP}/td-hm_hrformer-small_8xb32-210e_coco-256x192.py', _SMALL),
    Case('HeatmapHead-UDP', f'{_HEATMAP}/td-hm_hrnet-w32_udp-regress-8xb64-210e_coco-256x192.py', _SMALL),
    Case('ViPNASHead', f'{_HEATMAP}/td-hm_vipnas-mbv3_8xb64-210e_coco-256x192.py', _SMALL),
    Case('CPMHead', f'{_HEATMAP}/td-hm_cpm_8xb64-210e_coco-256x192.py', (32, 32), stride=8),
    Case('MSPNHead', f'{_HEATMAP}/td-hm_rsn18_8xb32-210e_coco-256x192.py'),
    Case('SimCCHead', f'{_BODY}/simcc/coco/simcc_mobilenetv2_wo-deconv-8xb64-210e_coco-256x192.py'),
    Case('RTMCCHead', f'{_BODY}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'),
    Case(
        'RTMWHead',
        'wholebody_2d_keypoint/rtmpose/cocktail14/rtmw-m_8xb1024-270e_cocktail14-256x192.py',
        keypoints=133,
    ),
    Case(
        'RegressionHead',
        'face_2d_keypoint/topdown_regression/wflw/td-reg_res50_softwingloss_8xb64-210e_wflw-256x256.py',
        _SMALL,
        keypoints=98,
    ),
    Case(
        'RLEHead',
        f'{_BODY}/topdown_regression/coco/td-reg_mobilenetv2_rle-pretrained-8xb64-210e_coco-256x192.py',
        _SMALL,
    ),
    Case('DSNTHead', f'{_BODY}/integral_regression/coco/ipr_res50_dsnt-8xb64-210e_coco-256x256.py', _SMALL, edit=_dsnt),
    Case(
        'IntegralRegressionHead',
        f'{_BODY}/integral_regression/coco/ipr_res50_8xb64-210e_coco-256x256.py',
        _SMALL,
        edit=_integral,
    ),
    Case('VisPredictHead', f'{_HEATMAP}/td-hm-vis_res50_8xb64-210e_coco-aic-256x192-merge.py', _SMALL),
    Case(
        'AssociativeEmbeddingHead',
        f'{_BODY}/associative_embedding/coco/ae_hrnet-w32_8xb24-300e_coco-512x512.py',
        _SMALL,  # one person: MMPose 1.3's head takes no more in training
        edit=_ae,
        sample=grouped_sample,
    ),
    Case(
        'CIDHead',
        f'{_BODY}/cid/coco/cid_hrnet-w32_8xb20-140e_coco-512x512.py',
        _SMALL,
        people=2,
        sample=crowd_sample,
    ),
    Case('YOLOXPoseHead', f'{_BODY}/yoloxpose/coco/yoloxpose_s_8xb32-300e_coco-640.py', (96, 96), people=2),
    Case('RTMOHead', f'{_BODY}/rtmo/coco/rtmo-s_8xb32-600e_coco-640x640.py', (96, 96), people=2),
    Case(
        'InternetHead',
        'hand_3d_keypoint/internet/interhand3d/internet_res50_4xb16-20e_interhand3d-256x256.py',
        _SMALL,
        stride=None,
        keypoints=42,
        edit=_hands,
        sample=hands_sample,
    ),
    Case(
        'MotionRegressionHead',
        f'{_LIFT}/motionbert/h36m/motionbert_dstformer-243frm_8xb32-240e_h36m.py',
        sample=motion_sample(9, 9),
    ),
    Case(
        'TemporalRegressionHead',
        f'{_LIFT}/video_pose_lift/h36m/video-pose-lift_tcn-27frm-supv_8xb128-160e_h36m.py',
        sample=motion_sample(27, 1),
    ),
    Case(
        'TrajectoryRegressionHead',
        f'{_LIFT}/video_pose_lift/h36m/video-pose-lift_tcn-27frm-semi-supv_8xb64-200e_h36m.py',
        edit=_trajectory,
        sample=motion_sample(27, 1),
    ),
    Case(
        'DWPoseDistiller',
        'wholebody_2d_keypoint/dwpose/ubody/s1_dis/dwpose_l_dis_t_coco-ubody-256x192.py',
        keypoints=133,
        edit=_distiller,
    ),
)

# Left out: EDPoseHead (its loss says that training isn't supported, MMPose 1.3) and ViTPose (its backbone is in
# mmpretrain). Configs whose model calls an operator that mmcv-lite lacks.
NEED_OPERATORS = (
    Case(
        'DEKRHead',  # deformable convolution
        f'{_BODY}/dekr/coco/dekr_hrnet-w32_8xb10-140e_coco-512x512.py',
        _SMALL,
        people=2,
        sample=crowd_sample,
    ),
)

# Warnings of the dependencies' own, raised while their modules are imported and their models built and run.
QUIET = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in (
        '.*MultiScaleDeformableAttention.* has been moved',
        'In MMCV v1.4.4, we modified the default value',
        '.*torch.cuda.amp.autocast.* is deprecated',
        'The metainfo config file .* does not exist',
        'torch.meshgrid. in an upcoming release',
        'The arguments `dropout` in MultiheadAttention has been deprecated',
        'The shape of value will convert from',
    )
]


def set_epoch(epoch: int) -> None:
    """Set the epoch that some models read from the message hub."""
    hub = MessageHub.get_current_instance()
    hub.update_info_dict({'epoch': epoch, 'max_epochs': 10, 'iter': 0, 'max_iters': 100})

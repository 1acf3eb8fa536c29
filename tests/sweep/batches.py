"""Batches of noise for the models of the three packages, made with the packages' own means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import default_collate

from tests.mmpose_cases import CASES, NEED_OPERATORS, Case, motion_sample
from tests.narrow import narrow

BATCH = 2
Batch = dict[str, Any]


def values(part: Any, key: str) -> Iterator[Any]:
    """All values that ``key`` has in a config."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from values(value, key)


def make_batch(package: str, cfg: Config, size: int | None) -> Batch:
    """A batch for a package's config.

    Args:
        package: The package that the config belongs to.
        cfg: The config; its sizes are changed where the model has to know ``size``.
        size: Height and width of the pictures, in pixels; ``None`` leaves the recipe's.
    """
    return {'mmpretrain': _pretrain, 'mmdet': _detect, 'mmpose': _pose}[package](cfg, size)


# ------------------------------------------------------------------------------------------------ MMPretrain
def _pretrain(cfg: Config, size: int | None) -> Batch:
    if not cfg.get('train_dataloader') or (cfg.model.type == 'ImageClassifier' and 'head' not in cfg.model):
        raise ValueError('only for inference')
    if cfg.model.type == 'ImageClassifier':
        return _classify(cfg, 32 if cfg.model.backbone.type == 'LeNet5' else size)
    from mmpretrain.registry import TRANSFORMS

    rng = np.random.default_rng(0)
    if size:
        _crop_small(cfg, size)
    pipeline = cfg.get('train_pipeline') or cfg.train_dataloader.dataset.pipeline
    transforms = Compose([TRANSFORMS.build(step) for step in pipeline if not step['type'].startswith('Load')])
    samples = []
    for number in range(BATCH):
        picture = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        sample = {'img': picture, 'img_shape': (256, 256), 'ori_shape': (256, 256), 'gt_label': number}
        samples.append(transforms({**sample, 'sample_idx': number, 'img_path': f'{number}.png'}))
    return default_collate(samples)  # type: ignore[no-any-return]


def _crop_small(cfg: Config, size: int) -> None:
    """Make the crops of a pipeline smaller, the smallest half of ``size``, for networks that take any size."""
    for part in (values(cfg._cfg_dict, 'transforms'), values(cfg._cfg_dict, 'pipeline'), [cfg.get('train_pipeline')]):
        for step in _steps(list(part)):
            for key in ('scale', 'crop_size'):
                if isinstance(step.get(key), int):
                    step[key] = size if step[key] > 128 else size // 2


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _steps(value)


def _classify(cfg: Config, size: int | None) -> Batch:
    from mmpretrain.structures import DataSample

    backbone = cfg.model.backbone
    for key in ('img_size', 'input_size'):
        pair = isinstance(backbone.get(key), (tuple, list))
        if size and key in backbone:
            backbone[key] = (size, size) if pair else size
        elif key in backbone:
            size = backbone[key][0] if pair else backbone[key]
    size = size or 224
    channels = backbone.get('in_channels', 1 if backbone.type == 'LeNet5' else 3)
    classes = min((n for n in values(cfg.model, 'num_classes') if n > 0), default=2)
    many = 'MultiLabel' in cfg.model.head.type or cfg.model.head.type == 'CSRAClsHead'
    inputs = torch.randint(0, 256, (BATCH, channels, size, size), dtype=torch.uint8)
    samples = [
        DataSample(metainfo={'sample_idx': i}).set_gt_label([i % classes] if many else i % classes)
        for i in range(BATCH)
    ]
    if many:
        for sample in samples:
            sample.set_field(classes, 'num_classes', field_type='metainfo')
    return {'inputs': inputs, 'data_samples': samples}


# ------------------------------------------------------------------------------------------------ MMDetection
def _detect(cfg: Config, size: int | None) -> Batch:
    from mmdet.testing import demo_mm_inputs

    size = size or 320
    for augments in values(cfg.model, 'batch_augments'):
        for augment in augments or ():  # they enlarge pictures
            for key in {'size', 'scale'} & set(augment):
                augment[key] = (size, size)
            if 'random_size_range' in augment:
                augment['random_size_range'] = (size // 2, size)
    classes = min((n for n in values(cfg.model, 'num_classes') if isinstance(n, int)), default=80)
    kind = cfg.model.type
    if kind in _SPECIAL:
        return _SPECIAL[kind](cfg, size)
    panoptic = 'num_things_classes' in str(cfg.model)
    batch = demo_mm_inputs(
        BATCH,
        (3, size, size),
        num_items=[3] * BATCH,
        num_classes=max(min(classes, 10), 2),
        sem_seg_output_strides=1 if panoptic else 8,
        with_mask=re.search('mask_head|loss_mask|mask_loss|Mask', str(cfg.model)) is not None,
        with_semantic=True,
        use_box_type=True,
    )
    for sample in batch['data_samples']:
        sample.set_metainfo({'batch_input_shape': (size, size), 'pad_shape': (size, size)})
        if classes == 1:
            sample.gt_instances.labels.zero_()
        if 'FastRCNN' in kind and 'rpn_head' not in cfg.model:
            sample.proposals = _proposals(sample)
    return batch  # type: ignore[no-any-return]


def _proposals(sample: Any) -> Any:
    from mmengine.structures import InstanceData

    return InstanceData(bboxes=sample.gt_instances.bboxes.tensor + 1, scores=torch.ones(len(sample.gt_instances)))


def _branches(cfg: Config, size: int) -> Batch:
    """Labelled and unlabelled pictures, as the semi-supervised detectors take them."""
    from mmdet.testing import demo_mm_inputs

    parts = {}
    for branch in ('sup', 'unsup_teacher', 'unsup_student'):
        parts[branch] = demo_mm_inputs(BATCH, (3, size, size), num_items=[3] * BATCH)
        for sample in parts[branch]['data_samples']:
            sample.set_metainfo({'homography_matrix': np.eye(3, dtype=np.float32)})
    return {key: {branch: part[key] for branch, part in parts.items()} for key in ('inputs', 'data_samples')}


def _video(cfg: Config, size: int) -> Batch:
    from mmdet.testing import demo_track_inputs

    return demo_track_inputs(  # type: ignore[no-any-return]
        batch_size=1,
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=(3, size, size),
        num_items=[3],
        num_classes=1,
        with_mask=True,
    )


def _persons(cfg: Config, size: int) -> Batch:
    """Pictures of the same persons, for re-identification."""
    from mmdet.structures import ReIDDataSample

    samples = []
    for number in range(2 * BATCH):
        sample = ReIDDataSample()
        sample.set_gt_label(number // 2)
        samples.append(sample)
    return {'inputs': torch.randint(0, 256, (2 * BATCH, 3, 256, 128), dtype=torch.uint8), 'data_samples': samples}


_SPECIAL: dict[str, Callable[[Config, int], Batch]] = {
    'SoftTeacher': _branches,
    'SemiBaseDetector': _branches,
    'QDTrack': _video,
    'MaskTrackRCNN': _video,
    'Mask2FormerVideo': _video,
    'BaseReID': _persons,
}


# ------------------------------------------------------------------------------------------------ MMPose
_SIZES = ('input_size', 'heatmap_size', 'in_featuremap_size', 'image_size', 'img_size')
# Models whose labels take more than keypoints in a picture: the cases know how to make them.
_MADE_BY_CASES = {
    *('AssociativeEmbeddingHead', 'CIDHead', 'DEKRHead', 'YOLOXPoseHead', 'RTMOHead', 'InternetHead'),
    *('MotionRegressionHead', 'TemporalRegressionHead', 'TrajectoryRegressionHead', 'DWPoseDistiller'),
}


def _pose(cfg: Config, size: int | None) -> Batch:
    head = cfg.model.get('head') or {}
    name = 'TrajectoryRegressionHead' if 'traj_head' in cfg.model else head.get('type', cfg.model.type)
    for case in (*NEED_OPERATORS, *CASES):
        if case.name == name and name in _MADE_BY_CASES:
            narrow(cfg.model)
            case.edit(cfg)
            frames = next(values(cfg._cfg_dict, 'seq_len'), None)
            if name == 'TemporalRegressionHead' and frames:
                case = replace(case, sample=motion_sample(frames, 1))
            return case.batch(cfg)
    if size:
        width, height = next(values(cfg._cfg_dict, 'input_size'))
        _divide(cfg._cfg_dict, next(n for n in (4, 3, 2, 1) if not (width // 32 % n or height // 32 % n)))
    channels = next(n for key in ('num_keypoints', 'num_joints', 'out_channels') for n in values(head, key))
    combined = 'combined' in values(cfg._cfg_dict, 'heatmap_type')  # a heatmap and two offsets for each keypoint
    return Case('', '', None, None, int(channels) // (3 if combined else 1)).batch(cfg)


def _divide(part: Any, by: int) -> None:
    """Make all sizes of pictures and of what is computed of them smaller, in place."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in _SIZES and isinstance(value, (tuple, list)) and all(isinstance(n, int) for n in value):
                part[key] = tuple(n // by for n in value)
            else:
                _divide(value, by)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _divide(value, by)

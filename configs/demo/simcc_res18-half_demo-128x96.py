# A small SimCC model on the drawn people of tools/make_demo_data.py: the base optimizer, without SAM.
_base_ = ['mmpose::_base_/default_runtime.py']

# Steps count for more than large batches when all is over in minutes: 150 iterations an epoch.
batch_size = 16
base_lr = 4e-3
max_epochs = 10

train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
randomness = dict(seed=0)
auto_scale_lr = dict(base_batch_size=batch_size)

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=base_lr, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = [
    # Half an epoch.
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

# 96 wide, 128 high. Two bins a pixel; sigma = sqrt(bins / 16) for each axis, RTMPose's rule.
codec = dict(type='SimCCLabel', input_size=(96, 128), sigma=(3.46, 4.0), simcc_split_ratio=2.0)

model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    # Half the usual width, from random weights: nothing is downloaded.
    backbone=dict(type='ResNet', depth=18, stem_channels=32, base_channels=32),
    head=dict(
        type='SimCCHead',
        in_channels=256,  # 8 * base_channels
        out_channels=17,
        input_size=codec['input_size'],
        in_featuremap_size=(3, 4),  # the input's size / 32
        simcc_split_ratio=codec['simcc_split_ratio'],
        deconv_out_channels=None,
        loss=dict(type='KLDiscretLoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=True),
)

# By these names MMPose's MMPoseInferencer reads them.
dataset_type = 'CocoDataset'
data_mode = 'topdown'
data_root = 'data/demo/'
# Shown by the tools where the data set is missing.
data_hint = 'make it with: python tools/make_demo_data.py --out data/demo'

# No augmentation: within minutes a small model gains nothing from it, and the gap between training and held-out people,
# which a sharpness-aware method should narrow, would be hidden.
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='GenerateTarget', encoder=codec),
    dict(type='PackPoseInputs'),
]
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='PackPoseInputs'),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    persistent_workers=True,
    drop_last=True,  # the loss is a sum over the batch, so a short last batch would take a short step
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline,
    ),
)
# Boxes come from the annotations (no bbox_file).
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=val_pipeline,
    ),
)
test_dataloader = val_dataloader

# `make train` ends with both: AP after COCO's rules, and the share of keypoints within 0.2 of the box size.
val_evaluator = [
    dict(type='CocoMetric', ann_file=data_root + 'annotations/person_keypoints_val.json'),
    dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'),
]
test_evaluator = val_evaluator

# Two checkpoints are kept: the older one is removed before the newer one is complete.
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, save_best='coco/AP', rule='greater', max_keep_ckpts=2),
)

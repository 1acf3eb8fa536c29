# What `make train` trains: EfficientNet-Lite0 with ImageNet's weights, fine-tuned on few of the drawn people, with a
# heatmap head. The base optimizer, without SAM.
_base_ = ['mmpose::_base_/default_runtime.py']

custom_imports = dict(
    imports=['mm_sharp', 'mm_sharp.analysis.study.cached', 'mm_sharp.analysis.study.efficientnet_lite0']
)

batch_size = 16
max_epochs = 20
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
randomness = dict(seed=0)
env_cfg = dict(mp_cfg=dict(mp_start_method='spawn', opencv_num_threads=1))

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    # The head begins with random weights.
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, custom_keys=dict(head=dict(lr_mult=3))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

# 144 wide, 192 high; a heatmap's pixel is four of the input's.
codec = dict(type='MSRAHeatmap', input_size=(144, 192), heatmap_size=(36, 48), sigma=2, unbiased=True)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(type='PoseDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True),
    # The first five of seven stages, with 112 channels. Two of them stay as ImageNet has left them: edges and colours
    # are the same there, and a step takes half of the time.
    backbone=dict(type='EfficientNetLite0', out_stride=16, frozen_stages=2),
    head=dict(
        type='HeatmapHead',
        in_channels=112,
        out_channels=17,
        # From the input's size / 16 to a quarter of it.
        deconv_out_channels=(64, 64),
        deconv_kernel_sizes=(4, 4),
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)

# By these names MMPose's MMPoseInferencer reads them.
dataset_type = 'CachedCocoDataset'
data_mode = 'topdown'
data_root = 'data/demo/'
# Shown by the tools where the data set is missing.
data_hint = 'make it with: python tools/make_demo_data.py --out data/demo'

# No augmentation, and boxes that are little larger than the people: theirs are exact.
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale', padding=1.1),
    dict(type='TopdownAffine', input_size=codec['input_size']),
    dict(type='GenerateTarget', encoder=codec),
    dict(type='PackPoseInputs'),
]
val_pipeline = [*train_pipeline[:3], train_pipeline[-1]]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,  # pictures are decoded once, and kept
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_mode=data_mode,
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        indices=512,  # people, however many were drawn
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
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

# AP after COCO's rules, and the share of keypoints within 0.2 of the box size.
val_evaluator = [
    dict(type='CocoMetric', ann_file=data_root + 'annotations/person_keypoints_val.json'),
    dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'),
]
test_evaluator = val_evaluator

# All checkpoints are kept: the sharpness is measured at each.
default_hooks = dict(logger=dict(interval=8), checkpoint=dict(interval=4, max_keep_ckpts=-1))

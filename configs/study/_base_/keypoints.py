# What the study's keypoint recipes share: drawn people at 64x48, no augmentation, all samples cached in memory.
_base_ = ['mmpose::_base_/default_runtime.py']

custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.cached'])

batch_size = 16
base_lr = 4e-3
max_epochs = 30

train_cfg = dict(max_epochs=max_epochs)
randomness = dict(seed=0)
env_cfg = dict(mp_cfg=dict(mp_start_method='spawn', opencv_num_threads=1))

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=base_lr, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

input_size = (48, 64)
backbone = dict(
    type='ResNet',
    depth=18,
    # A quarter of the usual width; the last stage keeps its resolution, since 64x48 / 32 would leave 2x1.5.
    stem_channels=16,
    base_channels=16,
    strides=(1, 2, 2, 1),
)
data_preprocessor = dict(
    type='PoseDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
)

data_root = 'data/study/'
# Shown by the tools where the data set is missing.
data_hint = 'make it with: python tools/make_demo_data.py --out data/study --train 2048 --val 1024 --seed 1'

places = dict(batch_size=batch_size, num_workers=0, persistent_workers=False)
dataset = dict(type='CachedCocoDataset', data_root=data_root, data_mode='topdown', serialize_data=False)
# Of MMPose's many keys only those that are used: all are copied for each sample in each step.
pack = dict(
    type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', 'input_size', 'input_center', 'input_scale')
)
held_out = dict(ann_file='annotations/person_keypoints_val.json', data_prefix=dict(img='val/'), test_mode=True)
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
    pack,
]

# The first 256 held-out people choose rho, the others are reported.
val_dataloader = dict(
    **places,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(**dataset, **held_out, indices=256, pipeline=val_pipeline),
)
test_dataloader = dict(
    **places,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        **dataset,
        **held_out,
        indices=list(range(256, 1024)),
        pipeline=val_pipeline,
    ),
)
# Area under the curve of correct keypoints over distances up to 30 pixels (people are about 190 high), mean distance in
# pixels, and the share within a tenth of the box.
val_evaluator = [dict(type='AUC'), dict(type='EPE'), dict(type='PCKAccuracy', thr=0.1, norm_item='bbox')]
test_evaluator = val_evaluator

default_hooks = dict(logger=dict(interval=1000), checkpoint=dict(interval=-1, save_last=False))

# A small heatmap model for accuracy studies on the CPU.
_base_ = ['./_base_/keypoints.py']

codec = dict(type='MSRAHeatmap', input_size=_base_.input_size, heatmap_size=(12, 16), sigma=1.0)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.backbone,
    head=dict(
        type='HeatmapHead',
        in_channels=128,  # 8 * base_channels
        out_channels=17,
        # From the input's size / 16 to a quarter of it.
        deconv_out_channels=(64, 64),
        deconv_kernel_sizes=(4, 4),
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=_base_.input_size),
    dict(type='GenerateTarget', encoder=codec),
    _base_.pack,
]
train_dataloader = dict(
    **_base_.places,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **_base_.dataset,
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        indices=512,
        pipeline=train_pipeline,
    ),
)

# A small SimCC model for accuracy studies on the CPU: a run of the base optimizer takes seconds to a minute.
_base_ = ['./_base_/keypoints.py']

# Two bins a pixel; sigma = sqrt(bins / 16) for each axis, RTMPose's rule.
codec = dict(type='SimCCLabel', input_size=_base_.input_size, sigma=(2.45, 2.83), simcc_split_ratio=2.0)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.backbone,
    head=dict(
        type='SimCCHead',
        in_channels=128,  # 8 * base_channels
        out_channels=17,
        input_size=_base_.input_size,
        in_featuremap_size=(3, 4),  # the input's size / 16
        simcc_split_ratio=codec['simcc_split_ratio'],
        deconv_out_channels=None,
        loss=dict(type='KLDiscretLoss', use_target_weight=True),
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
    drop_last=True,  # the loss is a sum over the batch, so a short last batch would take a short step
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **_base_.dataset,
        ann_file='annotations/person_keypoints_train.json',
        data_prefix=dict(img='train/'),
        indices=512,
        pipeline=train_pipeline,
    ),
)

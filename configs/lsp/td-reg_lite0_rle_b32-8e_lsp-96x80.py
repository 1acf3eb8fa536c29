# Regression with residual log-likelihood estimation (RLE) on EfficientNet-Lite0.
_base_ = ['./_base_/lite0_96x80.py']

codec = dict(type='RegressionLabel', input_size=_base_.input_size)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.backbone,
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='RLEHead',
        in_channels=112,
        num_joints=14,
        loss=dict(type='RLELoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)
train_dataloader = dict(
    dataset=dict(pipeline=[*_base_.plain_pipeline, dict(type='GenerateTarget', encoder=codec), _base_.pack])
)

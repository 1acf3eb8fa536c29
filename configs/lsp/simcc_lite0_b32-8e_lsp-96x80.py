# SimCC on EfficientNet-Lite0.
_base_ = ['./_base_/lite0_96x80.py']

# Two bins a pixel; sigma = sqrt(bins / 16) for each axis, RTMPose's rule.
codec = dict(type='SimCCLabel', input_size=_base_.input_size, sigma=(3.16, 3.46), simcc_split_ratio=2.0)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.backbone,
    head=dict(
        type='SimCCHead',
        in_channels=112,
        out_channels=14,
        input_size=_base_.input_size,
        in_featuremap_size=_base_.feature_size,
        simcc_split_ratio=codec['simcc_split_ratio'],
        deconv_out_channels=None,
        loss=dict(type='KLDiscretLoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)
train_dataloader = dict(
    dataset=dict(pipeline=[*_base_.plain_pipeline, dict(type='GenerateTarget', encoder=codec), _base_.pack])
)

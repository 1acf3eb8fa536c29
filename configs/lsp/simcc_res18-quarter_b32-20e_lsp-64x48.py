# SimCC on a ResNet-18 of a quarter of the usual width, from random weights: for studies on the CPU.
_base_ = ['./_base_/lsp.py']

max_epochs = 20
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(_base_.param_scheduler[0], end=100),
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

input_size = (48, 64)
# Two bins a pixel; sigma = sqrt(bins / 16) for each axis, RTMPose's rule.
codec = dict(type='SimCCLabel', input_size=input_size, sigma=(2.45, 2.83), simcc_split_ratio=2.0)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    # The last stage keeps its resolution, since 64x48 / 32 would leave 2x1.5.
    backbone=dict(type='ResNet', depth=18, stem_channels=16, base_channels=16, strides=(1, 2, 2, 1)),
    head=dict(
        type='SimCCHead',
        in_channels=128,  # 8 * base_channels
        out_channels=14,
        input_size=input_size,
        in_featuremap_size=(3, 4),
        simcc_split_ratio=codec['simcc_split_ratio'],
        deconv_out_channels=None,
        loss=dict(type='KLDiscretLoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)

plain_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
]
train_dataloader = dict(
    dataset=dict(pipeline=[*plain_pipeline, dict(type='GenerateTarget', encoder=codec), _base_.pack])
)
val_dataloader = dict(dataset=dict(pipeline=[*plain_pipeline, _base_.pack]))
test_dataloader = val_dataloader

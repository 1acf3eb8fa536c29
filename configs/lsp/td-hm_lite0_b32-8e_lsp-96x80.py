# Heatmaps on EfficientNet-Lite0.
_base_ = ['./_base_/lite0_96x80.py']

codec = dict(type='MSRAHeatmap', input_size=_base_.input_size, heatmap_size=(20, 24), sigma=1.5)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.backbone,
    head=dict(
        type='HeatmapHead',
        in_channels=112,
        out_channels=14,
        # From the input's size / 16 to a quarter of it.
        deconv_out_channels=(64, 64),
        deconv_kernel_sizes=(4, 4),
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        decoder=codec,
    ),
    test_cfg=dict(flip_test=False),
)
train_dataloader = dict(
    dataset=dict(pipeline=[*_base_.plain_pipeline, dict(type='GenerateTarget', encoder=codec), _base_.pack])
)

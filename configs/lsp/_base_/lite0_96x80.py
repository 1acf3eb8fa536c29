# EfficientNet-Lite0 with ImageNet's weights, fine-tuned at 96x80: what the recipes of its three heads share.
_base_ = ['./lsp.py']

custom_imports = dict(
    imports=['mm_sharp', 'mm_sharp.analysis.study.cached', 'mm_sharp.analysis.study.efficientnet_lite0']
)

input_size = (80, 96)  # width, height
feature_size = (5, 6)  # input_size / 16
data_preprocessor = dict(type='PoseDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
# The first five of seven stages, with 112 channels.
backbone = dict(type='EfficientNetLite0', out_stride=16)
plain_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
]
val_dataloader = dict(dataset=dict(pipeline=[*plain_pipeline, _base_.pack]))
test_dataloader = val_dataloader

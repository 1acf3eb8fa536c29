# EfficientNet-Lite0 with ImageNet's weights, fine-tuned at 96x80: what the recipes of its three heads share.
_base_ = ['./lsp.py']

custom_imports = dict(
    imports=['mm_sharp', 'mm_sharp.analysis.study.cached', 'mm_sharp.analysis.study.efficientnet_lite0']
)

base_lr = 1e-3
max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=base_lr, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = [
    # Steps, whatever the size of the batch: as long as Adam's averages need to be of use.
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

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
val_dataloader = dict(
    **_base_.places,
    batch_size=64,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(**_base_.dataset, ann_file='select.json', test_mode=True, pipeline=[*plain_pipeline, _base_.pack]),
)
test_dataloader = dict(
    **_base_.places,
    batch_size=64,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(**_base_.dataset, ann_file='val.json', test_mode=True, pipeline=[*plain_pipeline, _base_.pack]),
)

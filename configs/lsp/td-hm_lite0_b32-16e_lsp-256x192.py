# Heatmaps on EfficientNet-Lite0 at MMPose's usual size: for a GPU.
_base_ = ['./td-hm_lite0_b32-8e_lsp-96x80.py']

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

input_size = (192, 256)  # width, height
codec = dict(type='MSRAHeatmap', input_size=input_size, heatmap_size=(48, 64), sigma=2.0)
# On a GPU, channels_last is a matter of precision and cuDNN: off, as MMPose's recipes are.
model = dict(backbone=dict(channels_last=False), head=dict(decoder=codec))

load = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
]
train_dataloader = dict(dataset=dict(pipeline=[*load, dict(type='GenerateTarget', encoder=codec), _base_.pack]))
val_dataloader = dict(dataset=dict(pipeline=[*load, _base_.pack]))
test_dataloader = val_dataloader

# Heatmaps on EfficientNet-Lite0, with the usual augmentation: flips, scale and rotation.
_base_ = ['./td-hm_lite0_b32-8e_lsp-96x80.py']

# Augmented people are not known by heart: three times as many epochs.
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    # Pictures hold 1.5 times the box: what larger shifts would show is black.
    dict(type='RandomBBoxTransform', shift_factor=0.0, scale_factor=(0.8, 1.2), rotate_factor=40.0),
    dict(type='TopdownAffine', input_size=_base_.input_size),
    dict(type='GenerateTarget', encoder=_base_.codec),
    _base_.pack,
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# The study's SimCC model at full width and resolution, under bfloat16: for a GPU.
_base_ = ['./simcc_res18-quarter_demo-64x48.py']

batch_size = 64
base_lr = 1e-3
max_epochs = 20

train_cfg = dict(max_epochs=max_epochs)
# bfloat16 needs no loss scaling; the wrappers of this package take the dtype and do none.
optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False), optimizer=dict(lr=base_lr)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

input_size = (192, 256)
# As in MMPose's recipe for COCO at this size.
codec = dict(type='SimCCLabel', input_size=input_size, sigma=(4.9, 5.66), simcc_split_ratio=2.0)
model = dict(
    backbone=dict(stem_channels=64, base_channels=64, strides=(1, 2, 2, 2)),
    head=dict(in_channels=512, input_size=input_size, in_featuremap_size=(6, 8), decoder=codec),
)

data_root = 'data/study-large/'
data_hint = 'make it with: python tools/make_demo_data.py --out data/study-large --train 20000 --val 2048 --seed 1'
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
    dict(type='GenerateTarget', encoder=codec),
    _base_.pack,
]
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=input_size),
    _base_.pack,
]
# About 3 GB in memory.
train_dataloader = dict(
    batch_size=batch_size, dataset=dict(data_root=data_root, indices=20000, pipeline=train_pipeline)
)
val_dataloader = dict(batch_size=batch_size, dataset=dict(data_root=data_root, indices=512, pipeline=val_pipeline))
test_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(data_root=data_root, indices=list(range(512, 2048)), pipeline=val_pipeline),
)

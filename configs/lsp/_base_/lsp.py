# Leeds Sports Pose Extended, as tools/dataset_converters/lsp.py writes it; for research, cite Johnson and Everingham.
# What all recipes on it share: optimizer and schedule, loaders but for their pipelines, metrics and runtime. Pictures
# are decoded once and kept in memory.
_base_ = ['mmpose::_base_/default_runtime.py', './metainfo.py']

custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.cached'])

batch_size = 32
max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
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

randomness = dict(seed=0)
env_cfg = dict(mp_cfg=dict(mp_start_method='spawn', opencv_num_threads=1))

data_root = 'data/lsp/'
# Shown by the tools where the data set is missing.
data_hint = 'make it from the original archive: python tools/dataset_converters/lsp.py ARCHIVE --out data/lsp'

places = dict(num_workers=0, persistent_workers=False)
dataset = dict(
    type='CachedCocoDataset',
    data_root=data_root,
    data_mode='topdown',
    metainfo=_base_.dataset_info,
    data_prefix=dict(img='images/'),
    serialize_data=False,
)
# Of MMPose's many keys only those that are used: all are copied for each sample in each step.
pack = dict(
    type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', 'input_size', 'input_center', 'input_scale')
)
train_dataloader = dict(
    **places,
    batch_size=batch_size,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, ann_file='train.json'),
)
held_out = dict(**places, batch_size=64, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False))
val_dataloader = dict(**held_out, dataset=dict(**dataset, ann_file='select.json', test_mode=True))
test_dataloader = dict(**held_out, dataset=dict(**dataset, ann_file='val.json', test_mode=True))

# The share of keypoints within a fifth of the box, the area under the curve of correct keypoints over distances up to
# 30 pixels (pictures have at most 160), and the mean distance in pixels.
val_evaluator = [dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'), dict(type='AUC'), dict(type='EPE')]
test_evaluator = val_evaluator

# 72 steps are an epoch of all 2,300 people; studies take fewer.
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='PCK', rule='greater')
)

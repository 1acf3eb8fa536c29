# Leeds Sports Pose Extended, as tools/dataset_converters/lsp.py writes it; for research, cite Johnson and Everingham.
# What all recipes on it share: loaders, metrics and runtime. Pictures are decoded once and kept in memory.
_base_ = ['mmpose::_base_/default_runtime.py', './metainfo.py']

custom_imports = dict(imports=['mm_sharp', 'mm_sharp.analysis.study.cached'])

batch_size = 32
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
# The share of keypoints within a fifth of the box, the area under the curve of correct keypoints over distances up to
# 30 pixels (pictures have at most 160), and the mean distance in pixels.
val_evaluator = [dict(type='PCKAccuracy', thr=0.2, norm_item='bbox'), dict(type='AUC'), dict(type='EPE')]
test_evaluator = val_evaluator

# 72 steps are an epoch of all 2,300 people; studies take fewer.
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='PCK', rule='greater')
)

# SimCC, ResNet-50, MPII: what its six recipes share.
_base_ = ['mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py', './schedule_20e.py']

# MMPose publishes no model of that recipe.
load_from = 'work_dirs/simcc_res50_float_wo-deconv-8xb64-210e_mpii-256x256/epoch_210.pth'
# Shown by tools/train.py where that file is missing.
load_hint = 'train it: python tools/train.py configs/qat/simcc_res50_float_wo-deconv-8xb64-210e_mpii-256x256.py'
# It has all weights: the backbone's need not be downloaded as well.
model = dict(backbone=dict(init_cfg=None))

# A tenth of the recipe's.
optim_wrapper = dict(optimizer=dict(lr=5e-5))

train_cfg = _base_.qat_train_cfg
param_scheduler = _base_.qat_param_scheduler
default_hooks = dict(checkpoint=_base_.qat_checkpoint)
custom_hooks = [*_base_.custom_hooks, _base_.qat_freeze_hook]

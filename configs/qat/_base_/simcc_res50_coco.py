# SimCC, ResNet-50, COCO: what its six recipes share.
_base_ = ['mmpose::body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py', './schedule_20e.py']

# MMPose's model of that recipe: AP 0.721 in float.
load_from = 'https://download.openmmlab.com/mmpose/v1/body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192-8e0f5b59_20220919.pth'
# It has all weights: the backbone's need not be downloaded as well.
model = dict(backbone=dict(init_cfg=None))

# A tenth of the recipe's.
optim_wrapper = dict(optimizer=dict(lr=1e-4))

train_cfg = _base_.qat_train_cfg
param_scheduler = _base_.qat_param_scheduler
default_hooks = dict(checkpoint=_base_.qat_checkpoint)
custom_hooks = [*_base_.custom_hooks, _base_.qat_freeze_hook]

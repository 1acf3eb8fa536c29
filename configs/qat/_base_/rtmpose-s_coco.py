# RTMPose-s, COCO: what its six recipes share.
_base_ = ['mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py', './schedule_20e.py']

# MMPose's model of that recipe: AP 0.716 in float.
load_from = 'https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/rtmpose-s_simcc-coco_pt-aic-coco_420e-256x192-8edcf0d7_20230127.pth'
# It has all weights: the backbone's need not be downloaded as well.
model = dict(backbone=dict(init_cfg=None))

# A tenth of the recipe's. (The recipe keeps these numbers under names of their own; so they are renewed here.)
base_lr = 4e-4
max_epochs = _base_.qat_epochs
optim_wrapper = dict(optimizer=dict(lr=base_lr))

train_cfg = _base_.qat_train_cfg
param_scheduler = _base_.qat_param_scheduler
default_hooks = dict(checkpoint=_base_.qat_checkpoint)

# MMPose weakens the augmentation for the last 30 of 420 epochs; the weights that we start from have seen that already.
stage2_num_epochs = 5
custom_hooks = [
    # The average of the weights goes as far back as in MMPose's recipe, measured by the length of the training, which
    # is a 21st of its own: 21 * 0.0002, and 2,000 (the default) / 21.
    dict(_base_.custom_hooks[0], momentum=0.0042, gamma=95),
    dict(_base_.custom_hooks[1], switch_epoch=max_epochs - stage2_num_epochs),
    _base_.qat_freeze_hook,
]

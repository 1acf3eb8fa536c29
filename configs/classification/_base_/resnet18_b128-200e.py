# ResNet-18 for 32x32 pictures, and a schedule of 200 epochs with batches of 128: what all configs in this folder share.
#
# Where the numbers are from: the ESAM paper's authors train ResNet-18 on CIFAR-10 and CIFAR-100 with SGD, momentum 0.9,
# a learning rate of 0.05 that falls along a cosine to 0 once an epoch, weight decay 1e-3, and 200 epochs of batches of
# 128 (github.com/dydjw9/Efficient_SAM, run.sh and utils/options.py at commit 1610d46). Those are ESAM's. That SGD, SAM
# and AUSAM use the same ones is ours, so that the configs differ in the optimizer wrapper alone.
_base_ = ['mmpretrain::_base_/models/resnet18_cifar.py', 'mmpretrain::_base_/default_runtime.py']

max_epochs = 200

optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-3))
param_scheduler = dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, eta_min=0, by_epoch=True)

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# For `--auto-scale-lr`: lr=0.05 belongs to 128 pictures a step, on however many processes.
auto_scale_lr = dict(base_batch_size=128)

# Ours: MMPretrain keeps the checkpoint of every epoch, of about 90 MB each. These two serve to resume.
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=2))

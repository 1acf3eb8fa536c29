# The same with 200 training samples: 5 steps an epoch.
_base_ = './digits_cnn.py'

# Chosen as in digits_cnn.py, with weight decays up to 3e-2, and 40 or 80 epochs.
base_lr = 0.2
weight_decay = 3e-3
max_epochs = 80

train_dataloader = dict(dataset=dict(size=200))
optim_wrapper = dict(optimizer=dict(lr=base_lr, weight_decay=weight_decay))
param_scheduler = dict(T_max=max_epochs, end=max_epochs)
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
default_hooks = dict(checkpoint=dict(interval=max_epochs))

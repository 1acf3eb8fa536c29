# The same with 20 % of the training labels flipped.
_base_ = './digits_cnn.py'

# Chosen as in digits_cnn.py, with learning rates from 0.005 to 0.4, weight decays up to 3e-2, and 10 epochs, too: there
# the network has not begun to learn the wrong labels. With the settings for right labels it learns them all.
base_lr = 0.05
weight_decay = 3e-2
max_epochs = 10

train_dataloader = dict(dataset=dict(flipped=0.2))
optim_wrapper = dict(optimizer=dict(lr=base_lr, weight_decay=weight_decay))
param_scheduler = dict(T_max=max_epochs, end=max_epochs)
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
default_hooks = dict(checkpoint=dict(interval=max_epochs))

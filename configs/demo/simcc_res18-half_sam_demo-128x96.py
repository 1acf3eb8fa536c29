# SAM on the same model and data, at equal compute: a step costs two of the base optimizer's, so half the epochs.
_base_ = ['./simcc_res18-half_demo-128x96.py', '../_base_/sam.py']

max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

# The paper's scale of rho, with which the figures in the docs were made.
optim_wrapper = dict(_base_.sharp_optim_wrapper, rho=0.05, adaptive=False, perturb='auto')
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]

# ESAM on the same model and data, at equal compute. With forward = 1 and backward = 2, a step costs
# (3 + beta + 3 * gamma) / 3 = (3 + 0.6 + 1.5) / 3 = 1.70 of the base optimizer's: 10 epochs / 1.70 = 5.9, so 6.
_base_ = ['./simcc_res18-half_demo-128x96.py', '../_base_/esam.py']

max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]

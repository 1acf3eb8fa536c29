# ESAM by history on the same model and data, at equal compute. Without the selection's forward, a step costs
# (2 + beta + 3 * gamma) / 3 = 1.37 of the base optimizer's, and with it, in every tenth step, 1.70; on average 1.40.
# 10 epochs / 1.40 = 7.1, so 7.
_base_ = ['./simcc_res18-half_demo-128x96.py', '../_base_/esam_history.py']

max_epochs = 7
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

optim_wrapper = _base_.sharp_optim_wrapper
custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]

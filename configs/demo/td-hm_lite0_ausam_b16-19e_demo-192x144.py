# AUSAM on the same model and people, at equal compute: half of each batch, twice, after a first epoch of whole batches,
# which costs two. 18 + 2 = 20 epochs of the base optimizer.
_base_ = ['./td-hm_lite0_b16-20e_demo-192x144.py']

max_epochs = 19
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]

# As in ../_base_/ausam.py.
optim_wrapper = dict(type='AUSAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights', sampling_ratio=0.5)
custom_hooks = [*_base_.custom_hooks, dict(type='SharpnessHook')]

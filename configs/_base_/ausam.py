# AUSAM (Deng et al. 2025) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# The scale of rho is sam.py's. Everything else is what the authors' code for CIFAR does: half of each batch, so a step
# costs what the base optimizer's does; whole batches in the first epoch, so a training costs 1 + 1 / epochs; s_min 0.1,
# and s_max from 0.1 to 0.5 over the first 15 % of the training. draw='uniform' takes the samples at random.
sharp_optim_wrapper = dict(
    type='AUSAMOptimWrapper',
    rho=0.02,
    adaptive='tensor',
    perturb='weights',
    sampling_ratio=0.5,
)
sharp_hook = dict(type='SharpnessHook')

# ESAM (Du et al. 2022) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# The paper's values for CIFAR, all three. With beta and gamma a step costs (3 + 0.6 + 3 * 0.5) / 3 = 1.70 of the base
# optimizer's.
sharp_optim_wrapper = dict(type='ESAMOptimWrapper', rho=0.05, beta=0.6, gamma=0.5)
sharp_hook = dict(type='SharpnessHook')

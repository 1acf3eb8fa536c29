# ESAM (Du et al. 2022) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# The values of the authors' code for ResNet-18 on CIFAR, all three (WideResNet-28-10: beta 0.5, rho 0.1;
# PyramidNet: beta 0.5, rho 0.2). With beta and gamma a step costs (3 + 0.6 + 3 * 0.5) / 3 = 1.70 of the base
# optimizer's.
sharp_optim_wrapper = dict(type='ESAMOptimWrapper', rho=0.05, beta=0.6, gamma=0.5)
sharp_hook = dict(type='SharpnessHook')

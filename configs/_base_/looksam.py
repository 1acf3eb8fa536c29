# LookSAM (Liu et al. 2022) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is SAM's. A second pass in one step of k = 5: a step costs 1 + 1/5 = 1.20 of the base optimizer's on average.
sharp_optim_wrapper = dict(type='LookSAMOptimWrapper', rho=0.05, k=5, alpha=0.7)
sharp_hook = dict(type='SharpnessHook')

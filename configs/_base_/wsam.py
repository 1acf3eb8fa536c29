# WSAM (Yue et al. 2023) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is SAM's; gamma is the default of the authors' code: sharpness has a weight of 0.9 / (1 - 0.9) = 9. Two passes: a
# step costs 2.00.
sharp_optim_wrapper = dict(type='WSAMOptimWrapper', rho=0.05, gamma=0.9)
sharp_hook = dict(type='SharpnessHook')

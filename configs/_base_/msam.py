# Momentum SAM (Becker et al. 2024) for any config; used as sam.py is, with the same names, so that
# changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is the default of the authors' code for SGD. One pass: a step costs what the base optimizer's costs, 1.00.
sharp_optim_wrapper = dict(type='MSAMOptimWrapper', rho=0.3)
sharp_hook = dict(type='SharpnessHook')

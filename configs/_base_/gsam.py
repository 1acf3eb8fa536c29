# GSAM (Zhuang et al. 2022) for any config; used as sam.py is, with the same names, so that changing over is one word.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho, at the highest learning rate, is SAM's; alpha and rho_min are the paper's for ViT-S/32 (for ResNet-50 it has
# alpha=0.01 and half of rho). Two passes: a step costs 2.00.
sharp_optim_wrapper = dict(type='GSAMOptimWrapper', rho=0.05, rho_min=0.0, alpha=0.4)
sharp_hook = dict(type='SharpnessHook')

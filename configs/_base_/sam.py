# SAM (Foret et al. 2021) for any config. It is added to `_base_` and referred to:
#
#   _base_ = ['mmpose::body_2d_keypoint/…/some_recipe.py', 'mm_sharp::_base_/sam.py']
#   optim_wrapper = _base_.sharp_optim_wrapper                 # merged into the recipe's: its optimizer stays
#   custom_hooks = [*_base_.custom_hooks, _base_.sharp_hook]   # optional: logs the sharpness
#
# It sets no key that MMPose's recipes set: MMEngine refuses two entries of `_base_` with the same key, and every
# recipe has an `optim_wrapper` and `custom_hooks`.
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is the paper's value.
sharp_optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05)
sharp_hook = dict(type='SharpnessHook')

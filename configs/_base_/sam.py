# SAM (Foret et al. 2021) for any config: added to `_base_`, and nothing else.
#
#   _base_ = ['mmpose::body_2d_keypoint/…/some_recipe.py', 'mm_sharp::_base_/sam.py']
#   optim_wrapper = dict(rho=0.01)   # optional: goes before what is here, as the recipe's own settings do
#
# MMEngine refuses two entries of `_base_` with the same key, and every recipe has `optim_wrapper` and `custom_hooks`.
# So the two dicts have names of their own, and take effect when the config has been read
# (mm_sharp/config/fragments.py).
custom_imports = dict(imports=['mm_sharp'], allow_failed_imports=False)

# rho is measured by the norm of each tensor of the weights, without norm layers and biases; docs/scale.md has why, and
# what was measured. The paper's SAM, whose rho is a length, is rho=0.05, adaptive=False, perturb='auto'.
sharp_optim_wrapper = dict(type='SAMOptimWrapper', rho=0.02, adaptive='tensor', perturb='weights')
sharp_hook = dict(type='SharpnessHook')

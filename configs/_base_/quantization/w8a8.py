# Quantization-aware training at 8 bits for any config: added to `_base_`, with the float model's checkpoint beside it.
#
#   _base_ = ['mmpose::body_2d_keypoint/…/some_recipe.py', 'mm_sharp::_base_/quantization/w8a8.py']
#   load_from = 'float.pth'
#
# It sets one key, which no recipe has; `--cfg-options sharp_quantization.policy.…` changes it. All keys of a policy:
# mm_sharp/quantization/policy.py.
sharp_quantization = dict(
    policy=dict(
        weight_bit_width=8,
        act_bit_width=8,
        # Maxima lose nothing at 8 bits (inputs: the 99.999th percentile), and take no search.
        scale_init='max',
        # As in deployment: there are no batch statistics in training any more, and the device has no BatchNorm to run.
        fold_batchnorm=True,
    ),
    calibration=dict(num_batches=16),
)

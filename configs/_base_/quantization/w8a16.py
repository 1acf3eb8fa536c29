# Quantization-aware training with 8-bit weights and 16-bit inputs; used as w8a8.py is. For networks that do not bear
# inputs of 8 bits: those with SiLU, for one, whose inputs have long tails.
sharp_quantization = dict(
    policy=dict(
        weight_bit_width=8,
        act_bit_width=16,
        scale_init='max',
        # Numbers of bits would be those of weights and inputs: the ends have 16-bit inputs, too.
        first_layers='same',
        last_layers='same',
        fold_batchnorm=True,
    ),
    calibration=dict(num_batches=16),
)

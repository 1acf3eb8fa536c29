# Quantization-aware training with 4-bit weights and 4-bit inputs; used as w8a8.py is.
sharp_quantization = dict(
    policy=dict(
        weight_bit_width=4,
        act_bit_width=4,
        # With few levels the largest value is a bad measure of a scale: take the scale of least squared error.
        scale_init='mse',
        # The image and what the decoder reads: a network's ends are its most sensitive layers.
        first_layers=8,
        last_layers=8,
        fold_batchnorm=True,
    ),
    calibration=dict(num_batches=16),
)

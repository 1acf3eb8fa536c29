# W4A4 quantization-aware training with the base optimizer.
_base_ = ['./_base_/td-hm_lite0_qat.py', '../_base_/quantization/w4a4.py']

# Instead of 16: the search for scales takes a second a batch and more.
sharp_quantization = dict(calibration=dict(num_batches=4))

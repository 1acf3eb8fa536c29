# W8A8 quantization-aware training with the base optimizer.
_base_ = ['./_base_/simcc_res18-half_qat.py', '../_base_/quantization/w8a8.py']

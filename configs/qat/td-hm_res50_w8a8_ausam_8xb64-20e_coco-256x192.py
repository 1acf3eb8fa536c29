_base_ = ['./_base_/td-hm_res50_coco.py', '../_base_/quantization/w8a8.py', '../_base_/ausam.py']

# A quarter of the fragment's 0.02, which lost 20 to 31 points at 4 bits (docs/results.md, "Real people, quantized"):
# BatchNorm is folded, and no longer takes out what a perturbation of the weights does to the size of the features.
optim_wrapper = dict(rho=0.005)

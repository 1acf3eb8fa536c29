# Quantization-aware fine-tuning of the float heatmap model: what its recipes share.
_base_ = ['../td-hm_lite0_b32-8e_lsp-96x80.py']

load_from = 'work_dirs/lsp-float/epoch_8.pth'
# Shown by tools/train.py where that file is missing.
load_hint = (
    'make it with: python tools/train.py configs/lsp/td-hm_lite0_b32-8e_lsp-96x80.py --work-dir work_dirs/lsp-float'
)

# ImageNet's weights would not fit: the BatchNorms are folded. Those of load_from are folded when they are loaded.
model = dict(backbone=dict(pretrained=False))

# The loader draws each batch's samples before it reads them: pictures that take no part are never decoded. (A recipe
# with train_dataloader.drop_last=True would set that to False, and drop_last=True in batch_sampler. This one has none.)
_base_ = './simcc_res50_ausam_8xb64-210e_coco-256x192.py'

train_dataloader = dict(batch_sampler=dict(type='AUSAMSampler'))

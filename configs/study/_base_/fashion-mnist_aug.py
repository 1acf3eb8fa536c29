# The same with the usual augmentation: shifts of up to four pixels, and flips.
_base_ = ['./fashion-mnist.py']

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='Resize', scale=32),
            dict(type='RandomCrop', crop_size=32, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ]
    )
)

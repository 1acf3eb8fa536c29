# MMPretrain's LeNet-5 for one channel of Fashion-MNIST.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=[72.94], std=[90.02], num_classes=10),
    backbone=dict(type='LeNet5', num_classes=10),
    head=dict(type='ClsHead', loss=dict(type='CrossEntropyLoss')),
)

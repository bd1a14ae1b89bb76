"""Weights from and to other libraries: PyTorch (torchvision, timm) and Keras."""

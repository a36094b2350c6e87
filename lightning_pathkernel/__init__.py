"""Path kernels for PyTorch Lightning."""

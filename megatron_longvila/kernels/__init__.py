"""Kernels on plain tensors, each with its plain-PyTorch twin in `reference`."""

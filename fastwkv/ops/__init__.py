"""The public operators: checks, PyTorch registration, autograd."""

"""Code that the training scripts share: arguments, the training loop, checkpoints, data and model cards."""

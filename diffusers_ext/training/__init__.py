"""What the training scripts share: arguments, the loop, checkpoints, data, and what they publish."""

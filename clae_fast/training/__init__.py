"""The training loop and what it stands on: the step on a device, run folders, checkpoints."""

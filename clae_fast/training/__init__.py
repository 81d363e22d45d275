"""Training: building a run, the loop, the step on a device, run folders and checkpoints."""

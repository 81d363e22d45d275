"""One training step: which pass of the encoder runs when, and what a pass does."""

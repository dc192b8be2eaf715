"""Training: losses, optimizer, step, loop, checkpoints, and what a run writes down."""

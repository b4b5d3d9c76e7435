"""Train models: one compiled step, the loop around it, optimizers, checkpoints and the run log."""

"""Define tasks: the loss, rows, metrics and predictions of each kind of model head."""

"""Set single weights to zero, chosen by pruning scores or by SparseGPT."""

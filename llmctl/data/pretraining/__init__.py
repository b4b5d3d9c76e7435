"""Build rows for self-supervised training: objectives, packing, mixtures and prepared corpora."""

"""Rows of self-supervised training: objectives, packing, mixtures and prepared corpora."""

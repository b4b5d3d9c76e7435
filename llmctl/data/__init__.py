"""Read data: sources, tokenizers, example rows, pretraining rows, and batches on devices."""

"""Read training and evaluation data: open sources, tokenize text, build rows, and copy batches to devices."""

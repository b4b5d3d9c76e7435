"""Data sources: random access to the rows of files and datasets."""

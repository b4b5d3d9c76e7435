"""Sources: random access to the rows of files and data sets."""

"""Build rows of labeled examples, with one file per kind of task."""

"""Build rows from labeled examples. Each module is for one type of task."""

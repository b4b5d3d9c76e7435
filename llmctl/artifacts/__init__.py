"""Artifacts: the folders that stages read and write. They are saved atomically and identified by a digest."""

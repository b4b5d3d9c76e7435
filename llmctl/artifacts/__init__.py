"""Artifacts: the folders that stages read and write, saved atomically and identified by digest."""

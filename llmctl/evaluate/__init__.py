"""Evaluate artifacts: tasks, metrics, speed measurements and reports."""

"""Evaluation of artifacts: tasks, metrics, speed, and reports."""

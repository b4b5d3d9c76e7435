"""Evaluate artifacts (saved models): tasks, metrics, speed measurements and reports."""

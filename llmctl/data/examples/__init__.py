"""Rows of labelled examples: one file per kind of task."""

"""Stages: one file each with a `Config` and a function `run`."""

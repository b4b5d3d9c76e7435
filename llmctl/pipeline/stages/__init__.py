"""Define the stages: one file each with a class `Config` and a function `run`."""

"""Measure properties of an artifact beside the metrics of its task, such as robustness. Each property is a probe."""

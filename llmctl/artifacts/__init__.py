"""Read and write artifacts. An artifact is a folder with a model, and is the input and output of stages.

An artifact is saved atomically, and identified by a digest of its content.
"""

"""Read and write artifacts. An artifact is a folder with a model, which a stage (such as pretrain or prune) reads or
writes.

An artifact is saved atomically, and identified by a digest of its content.
"""

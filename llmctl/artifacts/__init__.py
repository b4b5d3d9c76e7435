"""Read and write artifacts: folders with a model, which stages read and write.

An artifact is saved atomically, and identified by a digest of its content.
"""

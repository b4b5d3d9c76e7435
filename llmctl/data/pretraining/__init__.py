"""Build rows for self-supervised training: pack documents, apply objectives, mix sources, and prepare corpora."""

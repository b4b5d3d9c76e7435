"""Define settings classes that are immutable and strictly validated, shared settings such as the mesh and the
optimizer, and errors."""

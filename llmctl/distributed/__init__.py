"""Manage devices and processes: the mesh and its sharding rules, multi-process runs, and hardware figures."""

"""Devices and processes: the mesh and its sharding rules, several processes as one run, hardware figures."""

"""Manage devices and processes: device meshes, sharding rules, runs with several processes, and hardware data."""

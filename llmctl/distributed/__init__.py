"""Manage devices and processes: device meshes, sharding rules, commands in several processes, and hardware data."""

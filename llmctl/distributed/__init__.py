"""Manage devices and processes: device meshes, sharding rules, commands that run in several processes, and hardware
data."""

"""Mesh and sharding rules, the processes of a run, signals."""

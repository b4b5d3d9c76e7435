"""Analyze compiled HLO text: FLOPs, bytes and collectives per step, with the trip counts of loops."""

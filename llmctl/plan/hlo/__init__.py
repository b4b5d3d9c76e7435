"""Counts from a compiled program's text: FLOPs, bytes and collectives, with loops evaluated."""

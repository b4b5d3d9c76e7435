"""Remove heads, neurons, hidden channels and layers, so that arrays become smaller."""

"""Replace weights by numbers of few bits."""

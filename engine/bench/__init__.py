"""How fast a bundle runs here, and how far from what this machine could do."""

"""Floor 0: what a clip is."""

"""Floor 2, right: how a sound is tagged."""

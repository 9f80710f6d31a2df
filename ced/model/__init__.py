"""Floor 1: what a tagger is."""

"""Floor 2, left: how a student is made."""

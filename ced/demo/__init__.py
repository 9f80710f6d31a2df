"""The whole method at a small scale: from recordings to a student."""

"""The whole job at a small scale: from recordings to a student."""

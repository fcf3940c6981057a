"""Measurements of this package, and of what a user would run instead; run from the root of the repository."""

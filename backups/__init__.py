"""Backups of the databases that users have: taken by policies, verified, kept for as long as was said, and restored."""

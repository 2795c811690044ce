"""The long proof: real processes on a real PostgreSQL, a disaster every few seconds, and everything counted."""

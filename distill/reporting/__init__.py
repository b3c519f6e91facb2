"""Finished runs for a reader."""

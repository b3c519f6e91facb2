"""Exported students: written, checked, and used without this package."""

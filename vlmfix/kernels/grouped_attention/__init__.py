"""Grouped attention."""

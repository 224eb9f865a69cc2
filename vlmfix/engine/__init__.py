"""Decoding engines."""

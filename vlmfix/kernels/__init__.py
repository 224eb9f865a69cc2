"""Numerical operations: a folder each with the definition (reference.py), the Triton form and the choice."""

"""Numerical operations: each folder holds the definition (reference.py), the Triton form and the choice between them."""

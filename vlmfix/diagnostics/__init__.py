"""Measures and drawings of what a model looks at."""

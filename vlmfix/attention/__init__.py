"""Evaluation of attention plans and the per-request state they need."""

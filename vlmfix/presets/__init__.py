"""Settings published for particular checkpoints."""

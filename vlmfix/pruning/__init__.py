"""Visual-token pruners."""

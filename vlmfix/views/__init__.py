"""Views: other inputs made from the caller's (noised, removed or replaced pictures, other instructions)."""

"""Keeping one engine alive, honest about its state, and gone when asked."""

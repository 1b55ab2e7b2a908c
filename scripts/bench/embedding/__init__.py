"""Embedding services beside each other, on one core: see __main__."""

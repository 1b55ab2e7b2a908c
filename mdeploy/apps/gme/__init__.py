"""Multimodal embedding: what embed does, for images too."""

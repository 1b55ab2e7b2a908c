"""Isolated environments that hold an engine; the CLI's own environment never imports one."""

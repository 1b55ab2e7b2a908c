"""mdeploy: from a ModelScope id to a measured, supervised service on your own machines."""

__version__ = "0.1.0"

"""Services as systemd units: what to write, what must be true before, and how to do it so that it can be undone."""

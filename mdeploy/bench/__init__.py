"""A load tester on raw sockets that says how far its own numbers can be trusted."""

"""Models on a hub and in its cache: references, listing, download, and a mirror with the hub's protocol."""

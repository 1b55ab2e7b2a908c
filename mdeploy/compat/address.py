"""Addresses of controllers and workers, in one spelling."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def checked(text: str) -> str:
    """The address of a server, in one spelling. Raises ValueError for what is none."""
    parts = urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path.strip("/"):
        raise ValueError(f"{text!r} is no address like http://HOST:PORT")
    if parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in parts.netloc):
        raise ValueError(f"{text!r} is no address like http://HOST:PORT")
    port = parts.port  # raises ValueError for what is no number
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}"


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

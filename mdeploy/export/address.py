"""Addresses as nginx takes them: HOST:PORT, [IPV6]:PORT, unix:/PATH. Text in, checked values out."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from mdeploy.errors import UsageError

UNIX = "unix:"
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?")
_UNIX_PATH = re.compile(r"/[A-Za-z0-9_./@+-]+")
_ANY = ("0.0.0.0", "::", "*")


@dataclass(frozen=True, slots=True)
class Address:
    """Where something listens. `host` is a name, an IP, `*` for every address or, with port 0, `unix:/PATH`."""

    host: str
    port: int

    def __str__(self) -> str:
        if self.is_unix:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_unix(self) -> bool:
        """True for a socket in the file system."""
        return self.host.startswith(UNIX)

    @property
    def is_private(self) -> bool:
        """True where only processes of this machine can connect."""
        return self.is_unix or self.host == "localhost" or _is_loopback(self.host)

    @property
    def is_any(self) -> bool:
        """True for every address of the machine."""
        return self.host in _ANY


def server(text: str) -> Address:
    """The address of a server. Raises UsageError for what is none."""
    address = _parse(text, "--server", "10.0.0.6:8000, [fd00::6]:8000 or unix:/run/app.sock")
    if address.is_any:
        raise UsageError(f"--server {text}: that is no address to connect to", hint="name the machine's own address")
    return address


def listen(text: str) -> Address:
    """An address to listen on; a port alone means every address. Raises UsageError."""
    whole = f"*:{text}" if text.isdecimal() else text
    address = _parse(whole, "--listen", "80, 127.0.0.1:8080, [::1]:8080 or unix:/run/chat.sock")
    return Address("*", address.port) if address.is_any else address


def _parse(text: str, flag: str, examples: str) -> Address:
    if text.startswith(UNIX):
        if not _UNIX_PATH.fullmatch(text.removeprefix(UNIX)):
            raise UsageError(f"{flag} {text}: no absolute path of a socket", hint=f"{flag} {examples}")
        return Address(text, 0)
    host, colon, port = text.rpartition(":")
    if "://" in text or not colon or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"{flag} {text}: no HOST:PORT", hint=f"{flag} {examples}")
    return Address(_host(host, f"{flag} {text}", f"{flag} {examples}"), int(port))


def _host(text: str, what: str, hint: str) -> str:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = ipaddress.ip_address(inner)
    except ValueError:
        if text != "*" and (not _HOST.fullmatch(text) or re.fullmatch(r"[0-9.]+", text)):
            raise UsageError(f"{what}: {text!r} is no host", hint=hint) from None
        return text.lower()
    if (found.version == 6) != (inner != text) or "%" in inner:
        raise UsageError(f"{what}: write an IPv6 address in brackets, without a zone", hint=hint)
    return str(found)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

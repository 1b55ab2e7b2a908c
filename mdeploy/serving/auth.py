"""The API keys a service accepts. Nothing here writes a key anywhere, and no comparison tells how near a guess was."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from mdeploy.errors import ConfigError

KEYS_VARIABLE = "MDEPLOY_API_KEYS_FILE"
"""Names the file with the keys, one a line. Not set: the service asks for none."""


class Keys:
    """The keys of a file; without a file everybody may come in."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises ConfigError where the file cannot be read or holds no key."""
        self._path = path
        self._digests = _read(path) if path is not None else ()

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None

    def __len__(self) -> int:
        return len(self._digests)

    def reload(self) -> None:
        """Read the file again. Raises ConfigError where that fails; the keys from before then stay."""
        if self._path is not None:
            self._digests = _read(self._path)

    def allows(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header (`Bearer KEY`) carries one of the keys."""
        scheme, _, token = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and self._known(token.strip())

    def allows_basic(self, authorization: bytes) -> bool:
        """The same for `Basic`, with the key as the password: a browser can send nothing else for a page."""
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"basic":
            return False
        try:
            plain = base64.b64decode(token.strip(), validate=True)
        except binascii.Error:
            return False
        return self._known(plain.partition(b":")[2])

    def _known(self, token: bytes) -> bool:
        """Compares with every key, in the same time whichever fits."""
        digest, found = hashlib.sha256(token).digest(), False
        for each in self._digests:
            found |= hmac.compare_digest(digest, each)
        return found


def _read(path: Path) -> tuple[bytes, ...]:
    hint = "it must hold the API keys, one a line; mdeploy keys add NAME writes it"
    try:
        lines = path.read_bytes().split()
    except OSError as error:
        raise ConfigError(f"cannot read the keys in {path}: {error.strerror}", hint=hint) from error
    if not lines:
        raise ConfigError(f"{path} holds no key", hint=hint)
    return tuple(hashlib.sha256(line).digest() for line in lines)

"""What the user typed, as a model reference. Knows the shape of ids, nothing of networks or disks."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from mdeploy.errors import UsageError
from mdeploy.specs import ModelRef

DEFAULT_REVISION = "master"
_PAGES = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# Owner and name become one directory name, `owner--name`, and file systems stop at 255 bytes.
_MAX_ID = 200


def parse(text: str, revision: str | None = None) -> ModelRef:
    """`owner/name`, `owner/name@revision` or the address of a model page, as a reference.

    Both parts end up in directory names and URLs, so anything that could leave its directory
    is refused. Raises UsageError.
    """
    name, _, inline = _from_page(text.strip()).partition("@")
    if not is_id(name):
        raise UsageError(f"{text!r} is no model id: {_why_not(name)}", hint=_ID_HINT)
    if revision and inline and revision != inline:
        raise UsageError(
            f"two revisions for {name}: {inline!r} in the id and {revision!r} as --revision",
            hint="name the revision once",
        )
    wanted = revision or inline or DEFAULT_REVISION
    if text.strip().endswith("@") or not is_revision(wanted):
        raise UsageError(
            f"{wanted if inline or revision else text!r} is no revision: a branch, tag or commit is made of "
            "letters, digits and any of . _ - + /",
            hint=f"mdeploy download {name} --revision {DEFAULT_REVISION}",
        )
    return ModelRef(name, wanted)


_ID_HINT = "give owner/name as on the model's page, for example mdeploy download Qwen/Qwen3-0.6B"


def is_id(text: str) -> bool:
    """Whether `text` is an `owner/name` that is safe in a path."""
    parts = text.split("/")
    return len(text) <= _MAX_ID and len(parts) == 2 and all(_SEGMENT.fullmatch(part) for part in parts)


def is_revision(text: str) -> bool:
    """Whether `text` is a branch, tag or commit that is safe in a path; branches may hold slashes."""
    return 0 < len(text) <= _MAX_ID and all(_SEGMENT.fullmatch(part) for part in text.split("/"))


def _why_not(name: str) -> str:
    if name.startswith(("/", "./", "../", "~")):
        return "it looks like a path on this machine, and only models of the hub can be downloaded"
    if "://" in name:
        return "it is not the address of a model page on modelscope.cn"
    if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
        return "an id has two parts, owner/name"
    if len(name) > _MAX_ID:
        return f"it is longer than {_MAX_ID} characters"
    return "owner and name are letters, digits and any of . _ - +, and do not start with a dot or dash"


def _from_page(text: str) -> str:
    """The id in https://modelscope.cn/models/owner/name[/files…]; any other text as it is."""
    if not text.startswith(("http://", "https://")):
        return text
    try:
        url = urlsplit(text)
    except ValueError:
        return text
    parts = url.path.strip("/").split("/")
    if url.hostname in _PAGES and len(parts) >= 3 and parts[0] == "models":
        return "/".join(parts[1:3])
    return text

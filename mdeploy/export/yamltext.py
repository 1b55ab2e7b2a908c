"""YAML that every reader understands alike: what YAML 1.1 and 1.2 take for different types is quoted."""

from __future__ import annotations

import re
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
_NO_TEXT = re.compile(r"y|n|yes|no|on|off|true|false|null|nan|inf", re.IGNORECASE)


def dump(document: Any) -> str:
    """One document as block YAML, keys in their order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Indents lists, knows no anchors."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        if value.endswith("\n") and re.fullmatch(r"[\n -~]+", value):
            return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|")
        plain = _PLAIN.fullmatch(value) and not _NO_TEXT.fullmatch(value)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')

    Dumper.add_representer(str, text)
    return str(yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6))

"""Ask for a caption: python query.py cat.jpg."""

import argparse
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


def ask(url: str, image: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """One request; MDEPLOY_API_KEY is sent where it is set. Ends the program with what the service says is wrong."""
    headers = {"Content-Type": mimetypes.guess_type(image.name)[0] or "application/octet-stream"}
    if key := os.environ.get("MDEPLOY_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    address = f"{url}/caption?{urllib.parse.urlencode(parameters)}"
    try:
        request = urllib.request.Request(address, image.read_bytes(), headers)
    except OSError as error:
        sys.exit(f"cannot read {image}: {error.strerror}")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode(errors='replace')[:500]}")
    except OSError as error:
        sys.exit(f"cannot reach {url}: {error}; is the service up? (mdeploy ps)")


def main() -> None:
    """Ask what the command line says and print the answer."""
    parser = argparse.ArgumentParser(description="Ask the image-to-text service for a caption.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service [%(default)s]")
    parser.add_argument("--prompt", help="beginning of the caption")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of the caption, at most [30]")
    parser.add_argument("--num-beams", type=int, help="width of the search: slower, often better [1]")
    options = vars(parser.parse_args())
    url, image = options.pop("url").rstrip("/"), options.pop("image")
    answer = ask(url, image, {name: value for name, value in options.items() if value is not None})
    print(answer["caption"])


if __name__ == "__main__":
    main()

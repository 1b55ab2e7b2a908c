"""Ask the text-to-text service: python query.py "translate English to German: How old are you?"."""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any


def ask(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    """One request; MDEPLOY_API_KEY is sent where it is set. Ends the program with what the service says is wrong."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MDEPLOY_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/generate", json.dumps(asked).encode(), headers)
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
    parser = argparse.ArgumentParser(description="Ask the text-to-text service.")
    parser.add_argument("text")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service [%(default)s]")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of the answer, at most [64]")
    parser.add_argument("--num-beams", type=int, help="width of the search: slower, often better [1]")
    parser.add_argument("--length-penalty", type=float, help="with beams: above 1 prefers longer answers [1]")
    options = vars(parser.parse_args())
    url = options.pop("url").rstrip("/")
    print(ask(url, {name: value for name, value in options.items() if value is not None})["text"])


if __name__ == "__main__":
    main()

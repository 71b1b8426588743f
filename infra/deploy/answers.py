"""Health check of the containers: exit code 0 when the URL given answers with success."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

_SECONDS = 5


def answers(url: str) -> bool:
    """Whether `url` answers with a status below 400 within five seconds."""
    try:
        urllib.request.urlopen(url, timeout=_SECONDS).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) else 1)

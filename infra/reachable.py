"""Does anything answer at a URL? Asked before clients that would retry for minutes."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.parse
import urllib.request


def require_answer(url: str, timeout: float) -> None:
    """Return when anything at all answers HTTP at `url`, even with a refusal.

    Proxies are honoured as the environment sets them. User and password in the URL are not sent.

    Raises:
        OSError: when nothing answers within `timeout` seconds.
    """
    parts = urllib.parse.urlsplit(url)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    try:
        urllib.request.urlopen(bare.geturl(), timeout=timeout).close()
    except urllib.error.HTTPError as error:
        error.close()  # a refusal is an answer: the real client brings the credentials
    except urllib.error.URLError as error:
        # Which certificates to trust is for the real client to decide.
        if not isinstance(error.reason, ssl.SSLError):
            raise

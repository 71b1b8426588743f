"""Keep secrets out of what people read: logs, records, MLflow and model cards."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from regrow.infra.settings import environment

MASK = "***"

# A name is secret by its last word (`hub_token`, `AWS_SECRET_ACCESS_KEY`, `db-password`), so that
# `eos_token`, `max_tokens` and `dataset_keys`, which are everyday recipe keys, stay readable.
_SECRET_NAME = (
    r"(?:[\w.-]*[_.-])?(?:api[_-]?key|apikey|access[_-]?key(?:[_-]?id)?|account[_-]?key"
    r"|secret[_-]?key|private[_-]?key|client[_-]?secret|secret|password|passwd|passphrase"
    r"|credentials?|auth[_-]?string|connection[_-]?string|pgpassword|sas[_-]?token|session[_-]?token|security[_-]?token|auth[_-]?token"
    r"|access[_-]?token|refresh[_-]?token|hub[_-]?token|hf[_-]?token|api[_-]?token"
    r"|(?:wandb|comet|github|gitlab|mlflow|prefect|use_auth)[\w-]*[_-](?:token|key)|bearer)"
)
_NAMED = re.compile(
    rf"""(?P<head>(?<![\w.-])["']?{_SECRET_NAME}["']?\s*[:=]\s*)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s,;&}\])"']+)""",
    re.IGNORECASE,
)
# A bare `token:` is masked only before a long word: "unknown token: <|im_end|>" is a message about
# a vocabulary, and 16 characters are fewer than any issuer of access tokens uses.
_BARE_TOKEN = re.compile(
    r"""(?P<head>(?<![\w.-])["']?token["']?\s*[:=]\s*["']?)[\w.~+/-]{16,}""", re.IGNORECASE
)
_EMPTY = {"", "null", "none", "~", "true", "false", MASK}

# The second kind has a slash in its password, as keys of S3 often have; `host:80/a@b` has a port.
_USERINFO = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)"
    r"(?:[^/\s@\"']+|[^/\s@:\"']*:(?!\d+/)[^\s@\"']+)@",
    re.IGNORECASE,
)
# With a digit, so that prose ("bearer certificates") stays.
_BEARER = re.compile(r"\b(?P<kind>bearer)\s+(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_AUTHORIZATION = re.compile(
    r"""(?P<head>\bauthorization["']?\s*[:=]\s*["']?)(?:(?:basic|token)\s+)?[\w.~+/=-]{8,}""",
    re.IGNORECASE,
)
_PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)
# Token shapes that their issuers document, so that scanners can find them: Hugging Face, AWS key
# ids, GitHub, GitLab, OpenAI-style, Slack, Google API keys; and JSON web tokens.
_KNOWN_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bsk-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
# Signed URLs carry their secret in the query: S3, Google Cloud Storage and Azure SAS.
_SIGNED = re.compile(
    r"(?P<head>[?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)"
    r"|sig|signature|awsaccesskeyid)=)[^&\s\"']+",
    re.IGNORECASE,
)


# Shorter values (a user called "admin") would be masked inside of everyday words.
_SHORTEST_VALUE = 8


# GOOGLE_APPLICATION_CREDENTIALS and its like.
_NAMES_A_FILE = re.compile(r"(?:credentials|file|path|dir)$", re.IGNORECASE)


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether a value of this name (of a field, a variable, a parameter) must not be shown."""
    return re.fullmatch(rf"{_SECRET_NAME}|token", name, re.IGNORECASE) is not None


def _values(variables: Mapping[str, str]) -> list[str]:
    """What of these variables must not be shown: secrets by their names, passwords in URLs."""
    found: set[str] = set()
    for name, value in variables.items():
        if is_secret_name(name) and not _NAMES_A_FILE.search(name):
            # user:password, of which the second is the secret
            found |= {value, value.partition(":")[2]}
        elif "@" in value and "://" in value:
            found |= _password(value)
    values = [value for value in found if len(value) >= _SHORTEST_VALUE]
    return sorted(values, key=len, reverse=True)


def _password(url: str) -> set[str]:
    try:
        return {urlsplit(url).password or ""}
    except ValueError:  # no URL after all
        return set()


def _mask_named(match: re.Match[str]) -> str:
    value = match["value"]
    quote = value[0] if value[0] in "\"'" else ""
    if value.strip("\"'").lower() in _EMPTY:
        return match[0]
    return f"{match['head']}{quote}{MASK}{quote}"


def mask_secrets(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `***`.

    Masked are: values of names such as `hub_token`, `password`, `AWS_SECRET_ACCESS_KEY` (in YAML,
    JSON, `key=value` and query strings), user and password in a URL, signed-URL parameters,
    `Bearer ...` headers, PEM private keys, and strings of a known token shape (`hf_...`,
    `AKIA...`, `ghp_...`, ...); and the values that variables of such names have in this process's
    environment, wherever they stand. Masking twice changes nothing more.
    """
    for value in _values(environment()):
        text = text.replace(value, MASK)
    text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
    text = _SIGNED.sub(rf"\g<head>{MASK}", text)
    text = _BEARER.sub(rf"\g<kind> {MASK}", text)
    text = _AUTHORIZATION.sub(rf"\g<head>{MASK}", text)
    text = _PEM.sub(MASK, text)
    text = _KNOWN_SHAPES.sub(MASK, text)
    text = _BARE_TOKEN.sub(rf"\g<head>{MASK}", text)
    return _NAMED.sub(_mask_named, text)


def mask_texts(value: Any) -> Any:
    """A copy of lists, maps and texts in which secrets are masked, and so are texts by the name of
    their key."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, Mapping):
        return {
            key: MASK
            if isinstance(text, str) and text and is_secret_name(str(key))
            else mask_texts(text)
            for key, text in value.items()
        }
    return [mask_texts(item) for item in value] if isinstance(value, (list, tuple)) else value


def without_secrets(error: Exception) -> Exception:
    """`error`; where its message holds a secret, another of its kind's name that tells the rest."""
    text = str(error)
    masked = mask_secrets(text)
    return error if masked == text else RuntimeError(f"{type(error).__name__}: {masked}")

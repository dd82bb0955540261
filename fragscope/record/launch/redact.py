"""Command lines without secrets: what looks like one is replaced before it is kept or shown.

It goes by names (``--token X``, ``--api-key=X``, ``HF_TOKEN=X``, ``Authorization: Bearer X``, passwords in URLs) and by
the forms of well-known tokens, also inside longer arguments as in ``bash -c "…"``. What is secret but neither named nor
formed like a secret is not recognised.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"
_SECRETS = {
    "token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "pass", "credential", "credentials",
    "auth", "authorization", "apikey", "accesskey", "privatekey", "bearer", "cookie",
}  # fmt: skip
_KINDS_OF_KEY = {"api", "access", "secret", "private", "auth", "encryption", "signing", "account", "license", "master"}
_HARMLESS = {"max", "min", "num", "count", "limit", "id", "ids", "file", "path", "type", "size", "method", "mode"}
"""Words that make a name harmless: ``--max-token-len``, ``--password-file``, ``pad_token_id``."""
_PLAIN_VALUE = re.compile(r"[\d.,]{1,9}|true|false|none|null|auto|[01]", re.IGNORECASE)
"""Not a token, whatever its option is called: ``--token-budget 8192``."""

_OPTION = re.compile(r"--?[A-Za-z_][\w.\-]*")
_NAMED = re.compile(r"""(?<![\w.\-])(?P<name>-{0,2}[A-Za-z_][\w.\-]*)(?P<sign>["']?\s*[=:]\s*|\s+)""")
_VALUE = re.compile(r""""[^"]+"|'[^']+'|[^\s"',;&}]+""")
_URL_PASSWORD = re.compile(r"(?P<head>(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]*://[^\s/@:?#]*:)[^\s/?#]+(?=@)")
_URL_USER_ALONE = re.compile(r"(?P<head>https?://)[^\s/@:?#]+(?=@)")  # a token in place of a user
_HEADER = re.compile(r"(?P<head>\b(?:authorization\s*[:=]\s*(?:\w+\s+)?|bearer\s+))[^\s\"']+", re.IGNORECASE)
# huggingface.co, github.com, openai.com and anthropic.com, AWS, gitlab.com, Slack, JSON web tokens
_WELL_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[A-Za-z0-9_\-]{16,}|AKIA[0-9A-Z]{12,}|"
    r"glpat-[\w\-]{16,}|xox[abprs]-[\w\-]{10,}|(?<![\w\-])eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
)


def redact(arguments: Sequence[str]) -> str:
    """The command line as a shell reads it, with ``***`` for what looks like a secret."""
    out: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        named = _OPTION.fullmatch(before) is not None and _OPTION.fullmatch(argument) is None
        out.append(HIDDEN if named and _is_secret(before, argument) else _redacted(argument))
    return " ".join(_quoted(argument) for argument in out)


def _is_secret(name: str, value: str) -> bool:
    """Whether an option, an environment variable or a URL's parameter is named as secrets are."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name)
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    if not words or _HARMLESS.intersection(words):
        return False
    if words[-1] in ("key", "keys") and _KINDS_OF_KEY.intersection(words):
        return True
    named = _SECRETS.intersection(words)
    return bool(named - {"token"}) or ("token" in named and _PLAIN_VALUE.fullmatch(value) is None)


def _redacted(text: str) -> str:
    text = _URL_PASSWORD.sub(rf"\g<head>{HIDDEN}", text)
    text = _URL_USER_ALONE.sub(rf"\g<head>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<head>{HIDDEN}", text)
    whole = re.fullmatch(r"(?P<name>-{0,2}[A-Za-z_][\w.\-]*)=(?P<value>.+)", text, re.DOTALL)
    if whole is not None and _is_secret(whole["name"], whole["value"]):
        return f"{whole['name']}={HIDDEN}"
    at = 0
    while (match := _NAMED.search(text, at)) is not None:
        at = match.end("name")  # what looks like its value may be a name itself: bash -c "env HF_TOKEN=x"
        if not (match["sign"].strip() or match["name"].startswith("-")) or not _is_secret(match["name"], ""):
            continue
        value = _VALUE.match(text, match.end())
        if value is not None and _is_secret(match["name"], value[0].strip("\"'")):
            text = f"{text[: value.start()]}{HIDDEN}{text[value.end() :]}"
            at = value.start() + len(HIDDEN)
    return _WELL_KNOWN.sub(HIDDEN, text)


def _quoted(argument: str) -> str:
    return argument if argument == HIDDEN else shlex.quote(argument)

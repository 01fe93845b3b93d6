"""How brokers are reached: `kafka://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...][?security=...]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pipelines.errors import LogUnavailableError

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
FILES = {"cafile": "ssl_cafile", "certfile": "ssl_certfile", "keyfile": "ssl_keyfile"}
EXPECTED = "expected kafka://[USER:PASSWORD@]HOST:PORT[,HOST:PORT...] with security, mechanism, cafile, certfile, keyfile where needed"


def access_of(url: str) -> tuple[list[str], dict[str, Any]]:
    """Servers, and kafka-python's options for TLS and SASL. A user goes through SASL over TLS by PLAIN, files of certificates mean TLS,
    unless `security` and `mechanism` say otherwise; `%`, `@`, `:` and `/` in a password are written as %25, %40, %3A and %2F.

    Raises LogUnavailableError, without the password, for what is none.
    """
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    servers = [host for host in hosts.split(",") if host]
    given = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if unknown := sorted(given.keys() - {"security", "mechanism", *FILES}):
        raise LogUnavailableError(f"the log's address has {', '.join(unknown)}; {EXPECTED}")
    if not servers or parts.path.strip("/"):
        raise LogUnavailableError(f"the log's address names {hosts + parts.path!r}; {EXPECTED}")
    files = {FILES[name]: given[name] for name in FILES if name in given}
    for name, file in files.items():
        if not Path(file).is_file():
            raise LogUnavailableError(f"the log's address has {name.removeprefix('ssl_')}={file}, which is no file; give its whole path")
    protocol = given.get("security", "SASL_SSL" if login else "SSL" if files else "PLAINTEXT").upper()
    if protocol not in PROTOCOLS:
        raise LogUnavailableError(f"the log's address has security={protocol}; expected one of {', '.join(PROTOCOLS)}")
    options: dict[str, Any] = {"security_protocol": protocol, **files}
    if protocol.startswith("SASL") != bool(login):
        has = "a user" if login else "no user"
        raise LogUnavailableError(f"the log's address has {has} and security={protocol}; {EXPECTED}")
    if login:
        mechanism = given.get("mechanism", "PLAIN").upper()
        if mechanism not in MECHANISMS:
            raise LogUnavailableError(f"the log's address has mechanism={mechanism}; expected one of {', '.join(MECHANISMS)}")
        user, _, password = login.partition(":")
        options |= {"sasl_mechanism": mechanism, "sasl_plain_username": unquote(user), "sasl_plain_password": unquote(password)}
    return servers, options

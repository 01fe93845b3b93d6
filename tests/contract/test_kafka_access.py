"""Kafka behind users and TLS: the address, and a real broker that takes nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pipelines import LogUnavailableError, open_log
from pipelines.transport import kafka as transport
from pipelines.transport.kafka_access import access_of
from tests.conftest import absent
from tests.services import KafkaBroker

PASSWORD = "s3:cr@t/%"


def test_an_address_names_servers_user_and_certificates(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    assert access_of("kafka://a:1,b:2") == (["a:1", "b:2"], {"security_protocol": "PLAINTEXT"})
    assert access_of(f"kafka://a:1?cafile={ca}")[1] == {"security_protocol": "SSL", "ssl_cafile": str(ca)}
    servers, options = access_of(f"kafka://bank:{quote(PASSWORD, '')}@a:1,b:2?mechanism=scram-sha-512&cafile={ca}")
    assert servers == ["a:1", "b:2"]
    login = {"sasl_mechanism": "SCRAM-SHA-512", "sasl_plain_username": "bank", "sasl_plain_password": PASSWORD}
    assert options == {"security_protocol": "SASL_SSL", "ssl_cafile": str(ca), **login}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("kafka://", "names ''; expected kafka://"),
        ("kafka://a:1/topic", "names 'a:1/topic'"),
        ("kafka://a:1?pasword=secret", "has pasword; expected"),
        ("kafka://me:secret@a:1?security=PLAINTEXT", "has a user and security=PLAINTEXT"),
        ("kafka://a:1?security=SASL_SSL", "has no user and security=SASL_SSL"),
        ("kafka://a:1?security=HTTPS", "has security=HTTPS; expected one of PLAINTEXT, SSL"),
        ("kafka://me:secret@a:1?mechanism=NTLM", "has mechanism=NTLM; expected one of PLAIN, SCRAM-SHA-256"),
        ("kafka://me:secret@a:1?cafile=/no/ca.pem", "has cafile=/no/ca.pem, which is no file"),
    ],
)
def test_an_address_that_is_none_says_why_without_the_password(address: str, words: str) -> None:
    with pytest.raises(LogUnavailableError) as error:
        open_log(address)
    assert words in str(error.value)
    assert "secret" not in str(error.value)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[KafkaBroker, Path]]:
    """A broker that takes the user `bank`, or a certificate, over TLS, and its authority."""
    home = os.environ.get("KAFKA_HOME")
    if not home:
        absent("KAFKA_HOME is not set: no real Kafka that asks for a user")
    with KafkaBroker(Path(str(home)), tmp_path, {"bank": PASSWORD}) as broker:
        yield broker, tmp_path / "ca.pem"


def test_a_broker_that_asks_for_a_user_or_a_certificate_over_tls(
    secured: tuple[KafkaBroker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, ca = secured
    address = broker.address
    log = open_log(f"kafka://bank:{quote(PASSWORD, '')}@{address}?cafile={ca}")
    log.create_topic("t", 1)
    log.produce("t", b"x", key="k")
    consumer, found = log.consumer("g", ["t"]), []
    while not found:
        found = consumer.poll(1.0)
    consumer.commit(found[0])
    assert (found[0].value, log.lag("g", "t")) == (b"x", {0: 0})
    consumer.close()
    log.close()
    scram = open_log(f"kafka://bank:{quote(PASSWORD, '')}@{address}?mechanism=SCRAM-SHA-512&cafile={ca}")
    assert "t" in scram.topics()
    scram.close()
    own = f"{broker.with_certificate}?cafile={ca}&certfile={ca.parent / 'client.pem'}&keyfile={ca.parent / 'client.key'}"
    certified = open_log(f"kafka://{own}")
    certified.produce("t", b"y")
    assert certified.lag("g", "t") == {0: 1}
    certified.close()
    monkeypatch.setitem(transport.PATIENCE, "bootstrap_timeout_ms", 3000)
    for other in (
        f"{broker.with_certificate}?cafile={ca}",
        f"bank:wrong@{address}?cafile={ca}",
        f"bank:{quote(PASSWORD, '')}@{address}",
        address,
    ):
        with pytest.raises(LogUnavailableError, match=r"takes no client.*check the address's user, password") as error:
            open_log(f"kafka://{other}")
        assert "wrong" not in str(error.value)

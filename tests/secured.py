"""A Kafka with locks: TLS client certificates, SASL users, and ACLs, each on a listener of its own.

=============== ============================================================================================================
listener        who gets in, and what they may do
=============== ============================================================================================================
PLAINTEXT       the tests themselves; everything
SSL             who has a client certificate of our CA. The broker's own certificate names another host, as Heroku's do
SASL_PLAINTEXT  users with a password, by SCRAM or PLAIN
SASL_SSL        the same, encrypted; its certificate names 127.0.0.1
=============== ============================================================================================================

`FULL` may do everything. `LIMITED` may only do what ACLs of its prefix say, see `Secured.permit`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from streams_app import embedded
from streams_app.embedded import Broker, class_path, free_port

FULL, LIMITED = "full", "limited"
#: Each character of it means something in an address, or in SCRAM.
PASSWORD = "p@ss:w/r?d#,%=é"  # noqa: S105 - of brokers that live as long as a test
SCRAM = {"SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512, "SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256}


@dataclass
class Secured:
    """The broker, as tests see it."""

    plain_url: str
    ports: dict[str, int]
    ca: trustme.CA

    def __post_init__(self) -> None:
        self.admin = AdminClient({"bootstrap.servers": self.plain_url.removeprefix("kafka://"), "log_level": 0})
        for user in (FULL, LIMITED):
            changes = [
                UserScramCredentialUpsertion(user, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
                for mechanism in SCRAM.values()
            ]
            for change in changes:
                [future] = self.admin.alter_user_scram_credentials([change]).values()
                future.result(30)

    @property
    def trusted(self) -> str:
        """The CA."""
        return self.ca.cert_pem.bytes().decode()

    def certificate(self, common_name: str = FULL) -> tuple[str, str]:
        """A client's certificate with its chain, of a CA below the one that is trusted, and its key."""
        return _pems(self.ca.create_child_ca().issue_cert(f"{common_name}@example.org", common_name=common_name))

    def url(self, scheme: str, user: str = FULL, password: str = PASSWORD) -> str:
        """As KAFKA_URL."""
        listener = {"kafka+ssl": "SSL", "kafka+sasl": "SASL_PLAINTEXT", "kafka+sasl+ssl": "SASL_SSL"}[scheme]
        login = f"{user}:{quote(password, safe='')}@" if "sasl" in scheme else ""
        return f"{scheme}://{login}127.0.0.1:{self.ports[listener]}"

    def env(self, scheme: str, user: str = FULL) -> dict[str, str]:
        """The environment that reaches it."""
        env = {"KAFKA_URL": self.url(scheme, user)}
        if scheme.endswith("ssl"):
            env["KAFKA_TRUSTED_CERT"] = self.trusted
        if scheme == "kafka+ssl":
            env["KAFKA_CLIENT_CERT"], env["KAFKA_CLIENT_CERT_KEY"] = self.certificate(user)
        return env

    def permit(self, prefix: str, *grants: tuple[ResourceType, AclOperation]) -> None:
        """Let `LIMITED` do this to what begins with ``prefix``."""
        acls = [
            AclBinding(
                kind,
                prefix,
                ResourcePatternType.PREFIXED,
                f"User:{LIMITED}",
                "*",
                operation,
                AclPermissionType.ALLOW,
            )
            for kind, operation in grants
        ]
        for future in self.admin.create_acls(acls).values():
            future.result(30)

    def create_topics(self, topics: list[NewTopic]) -> None:
        """As whoever runs the cluster does it."""
        for future in self.admin.create_topics(topics).values():
            future.result(30)


#: What an app needs, but for transactions and the creation of topics.
READ_AND_WRITE = (
    (ResourceType.TOPIC, AclOperation.READ),
    (ResourceType.TOPIC, AclOperation.WRITE),
    (ResourceType.TOPIC, AclOperation.DESCRIBE_CONFIGS),
    (ResourceType.GROUP, AclOperation.READ),
)
CREATE = (ResourceType.TOPIC, AclOperation.CREATE)
TRANSACT = (ResourceType.TRANSACTIONAL_ID, AclOperation.WRITE)


def new_prefix() -> str:
    """As Heroku makes them."""
    return f"prefix-{uuid4().hex[:8]}."


@contextmanager
def secured_kafka(folder: Path) -> Iterator[Secured]:
    """Start it, and end it."""
    jars = class_path(print)
    broker = Broker(folder / "broker-1", 1)
    taken: list[int] = []
    for _ in range(5):
        taken.append(free_port(taken))
    plain, controller, *secured = taken
    ports = dict(zip(("SSL", "SASL_PLAINTEXT", "SASL_SSL"), secured, strict=True))
    ca = trustme.CA()
    broker._configure(plain, controller, ())
    embedded._write_configuration([broker])
    file = broker.home / "server.properties"
    settings = dict(line.split("=", 1) for line in file.read_text().splitlines())
    settings |= _locks(broker.home, ca, settings, ports)
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    try:
        embedded._format([broker], jars)
        broker._spawn(jars)
        broker._await_ready({1}, time.monotonic() + embedded.START_TIMEOUT_S)
        yield Secured(f"kafka://127.0.0.1:{plain}", ports, ca)
    finally:
        broker.kill()


def _locks(home: Path, ca: trustme.CA, settings: dict[str, str], ports: dict[str, int]) -> dict[str, str]:
    """What makes the embedded Kafka's configuration one with locks."""
    listeners = "".join(f",{name}://127.0.0.1:{port}" for name, port in ports.items())
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    password = PASSWORD.encode("unicode_escape").decode().replace("\\xe9", "\\u00e9")
    users = "".join(f' user_{user}="{password}"' for user in (FULL, LIMITED))
    locks = {
        "listeners": settings["listeners"] + listeners,
        "advertised.listeners": settings["advertised.listeners"] + listeners,
        "listener.security.protocol.map": settings["listener.security.protocol.map"]
        + "".join(f",{name}:{name}" for name in ports),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:ANONYMOUS;User:{FULL}",
        "ssl.principal.mapping.rules": "RULE:^CN=([^,]+),.*$/$1/,DEFAULT",
        "sasl.enabled.mechanisms": ",".join((*SCRAM, "PLAIN")),
    }
    for listener in ("sasl_plaintext", "sasl_ssl"):
        for mechanism in SCRAM:
            locks[f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config"] = scram
        locks[f"listener.name.{listener}.plain.sasl.jaas.config"] = f"{plain}{users};"
    for listener, host, clients in (("ssl", "kafka.example.org", "required"), ("sasl_ssl", "127.0.0.1", "none")):
        certificate, key = _pems(ca.issue_cert(host))
        (home / f"{listener}.pem").write_text(key + certificate)
        (home / "ca.pem").write_bytes(ca.cert_pem.bytes())
        locks |= {
            f"listener.name.{listener}.ssl.keystore.type": "PEM",
            f"listener.name.{listener}.ssl.keystore.location": str(home / f"{listener}.pem"),
            f"listener.name.{listener}.ssl.truststore.type": "PEM",
            f"listener.name.{listener}.ssl.truststore.location": str(home / "ca.pem"),
            f"listener.name.{listener}.ssl.client.auth": clients,
        }
    return locks


def _pems(leaf: trustme.LeafCert) -> tuple[str, str]:
    """Certificate with its chain, and its key in the only form that Kafka takes."""
    key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return "".join(pem.bytes().decode() for pem in leaf.cert_chain_pems), text


def faust(arguments: list[str], env: dict[str, str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command of ours; the environment is ``env`` and no other Kafka's."""
    return subprocess.run(
        [sys.executable, "-m", "faust", "-A", "streams_app", *arguments],
        env={**os.environ, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )

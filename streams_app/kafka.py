"""How to reach Kafka: address and credentials from the environment, as configuration for both client libraries.

The only owner of it: every client, of librdkafka or of aiokafka, is made with what `KafkaAddress` gives. Secrets stand in
fields that are not shown, and no error repeats what was written in ``KAFKA_URL``.

================== ============== ======================================================================================
scheme             encrypted      who we are
================== ============== ======================================================================================
kafka://           no             nobody
kafka+ssl://       yes            the client certificate, if there is one
kafka+sasl://      no             user and password of the URL
kafka+sasl+ssl://  yes            user and password of the URL
================== ============== ======================================================================================

Certificates are PEM text and stay in memory. Python's ``ssl`` wants the client's in files: it gets two without a name, which
nobody else can open and which are gone whatever happens.

With ``KAFKA_TRUSTED_CERT`` only brokers are trusted whose certificate that CA has signed. Host names are not compared then
(Heroku's brokers have certificates that do not name them), unless ``STREAMS_APP_KAFKA_CHECK_HOST_NAMES=yes``; without it they
always are, as anybody gets a certificate of some public CA.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from streams_app.errors import ConfigurationError, KafkaUnreachable

if TYPE_CHECKING:
    from streams_app.settings import Settings

DEFAULT_PORT = 9092
#: What librdkafka says by itself, see `_Voice`.
log = logging.getLogger("librdkafka")
_SCHEMES = {"kafka": "PLAINTEXT", "kafka+ssl": "SSL", "kafka+sasl": "SASL_PLAINTEXT", "kafka+sasl+ssl": "SASL_SSL"}


@dataclass(frozen=True)
class Login:
    """Who we are, by SASL."""

    mechanism: str
    user: str = field(repr=False)
    password: str = field(repr=False)


@dataclass(frozen=True)
class Certificates:
    """Whom we trust, and who we are, by TLS; PEM text."""

    #: The only CA whose brokers are trusted; None: those that this machine trusts.
    trusted: str | None = field(default=None, repr=False)
    client: str | None = field(default=None, repr=False)
    client_key: str | None = field(default=None, repr=False)
    check_host_names: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled, for a process of its own: a context cannot be, and is made anew there."""
        return {name: value for name, value in self.__dict__.items() if name != "context"}

    @cached_property
    def context(self) -> ssl.SSLContext:
        """For Python's own connections.

        Raises:
            ConfigurationError: a certificate or a key is none, or they do not belong together.
        """
        with _named("KAFKA_TRUSTED_CERT"):
            # What stands around the certificates is for people, in any language.
            pem = None if self.trusted is None else self.trusted.encode("ascii", "ignore").decode()
            context = ssl.create_default_context(cadata=pem)
        context.check_hostname = self.check_host_names
        # Python 3.13's own idea; librdkafka and the brokers do not ask for it, and CAs of old do not pass.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.client and self.client_key:
            with (
                _named("KAFKA_CLIENT_CERT or KAFKA_CLIENT_CERT_KEY"),
                _unnamed_file(self.client) as certificate,
                _unnamed_file(self.client_key) as key,
            ):
                # A key that has a password would be asked for it on the terminal.
                context.load_cert_chain(certificate, key, password="")
        return context


@contextlib.contextmanager
def _named(variable: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "it is no PEM text"
        raise ConfigurationError(f"{variable} cannot be used: {reason}") from None


@contextlib.contextmanager
def _unnamed_file(text: str) -> Iterator[str]:
    """A path to ``text``, as long as we are in here, and for this process alone."""
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}"


@dataclass(frozen=True)
class KafkaAddress:
    """The brokers of one cluster, and how to talk to them."""

    #: ``host:port``, comma-separated.
    servers: str
    protocol: str = "PLAINTEXT"
    login: Login | None = None
    certificates: Certificates | None = None

    @classmethod
    def parse(cls, url: str, settings: Settings | None = None) -> KafkaAddress:
        """Read a comma list of addresses, see the module; what is not in there is taken from ``settings``.

        Raises:
            ConfigurationError: there is no address in it, or one that cannot be used; or the certificates cannot.
        """
        parts = [
            _parse_one(number, part) for number, part in enumerate(filter(None, map(str.strip, url.split(","))), 1)
        ]
        if not parts:
            raise ConfigurationError(
                "KAFKA_URL is empty; write kafka://host:port, or leave it unset for the embedded Kafka"
            )
        for number, part in enumerate(parts, 1):
            if part[1:] != parts[0][1:]:
                raise ConfigurationError(
                    f"address {number} of KAFKA_URL has another scheme, user or password than the first: "
                    "they are brokers of one cluster, and must be reached in one way"
                )
        [(_, scheme, user, password), *_] = parts
        servers, protocol = ",".join(part.server for part in parts), _SCHEMES[scheme]
        login = certificates = None
        if protocol.startswith("SASL"):
            login = Login(settings.kafka_sasl_mechanism if settings else "SCRAM-SHA-512", user, password)
        if protocol.endswith("SSL"):
            certificates = _certificates(settings)
        return cls(servers, protocol, login, certificates)

    @classmethod
    def of(cls, settings: Settings) -> KafkaAddress:
        """The Kafka that the settings name; see `parse`."""
        return cls.parse(settings.kafka_url or f"kafka://127.0.0.1:{DEFAULT_PORT}", settings)

    @property
    def urls(self) -> list[str]:
        """For Faust's ``broker`` setting, which it shows; all that it needs of it is which library to use."""
        return [f"kafka://{server}" for server in self.servers.split(",")]

    def librdkafka(self) -> dict[str, Any]:
        """Configuration for confluent-kafka's clients.

        A client says what it has to say when it is polled: whoever makes one that is never polled gives it a ``log_level``
        of 0, and hears of errors by exceptions.
        """
        # Errors only: a broker that restarts is news to nobody here, and every client would tell it.
        config: dict[str, Any] = {"bootstrap.servers": self.servers, "log_level": 3, "logger": _VOICE}
        if self.protocol != "PLAINTEXT":
            config["security.protocol"] = self.protocol
        if self.login is not None:
            config["sasl.mechanisms"] = self.login.mechanism
            config["sasl.username"], config["sasl.password"] = self.login.user, self.login.password
        if self.certificates is not None:
            given = self.certificates
            pems = {
                "ssl.ca.pem": given.trusted,
                "ssl.certificate.pem": given.client,
                "ssl.key.pem": given.client_key,
            }
            config |= {name: pem for name, pem in pems.items() if pem}
            config["ssl.endpoint.identification.algorithm"] = "https" if given.check_host_names else "none"
        return config

    def aiokafka(self) -> dict[str, Any]:
        """Configuration for aiokafka's clients."""
        config: dict[str, Any] = {"bootstrap_servers": self.servers, "security_protocol": self.protocol}
        if self.login is not None:
            config["sasl_mechanism"] = self.login.mechanism
            config["sasl_plain_username"], config["sasl_plain_password"] = self.login.user, self.login.password
        if self.certificates is not None:
            config["ssl_context"] = self.certificates.context
        return config

    def check(self, timeout_s: float = 10.0) -> None:
        """Raise `KafkaUnreachable` if no broker answers within ``timeout_s``, and say what is known of why."""
        from confluent_kafka import KafkaException  # noqa: PLC0415 - only commands ask
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        reasons: list[str] = []
        heard: Any = lambda error: reasons.append(error.str())  # noqa: E731 - typed as any value of a configuration
        admin = AdminClient({**self.librdkafka(), "log_level": 0, "error_cb": heard})
        try:
            admin.list_topics(timeout=timeout_s)
        except KafkaException as error:
            admin.poll(0)
            why = next((each for each in reasons if "uthentication" in each or "SSL" in each), error.args[0].str())
            raise KafkaUnreachable(
                f"no Kafka broker answers at {self.servers} within {timeout_s:g} s: {why}"
            ) from error


class _Voice:
    """Passes librdkafka's log on to Python's, where the log is set up; by itself it writes lines of its own to stderr.

    Stands where a `logging.Logger` stands. What librdkafka calls an error it tries again, as a rule: that is a warning here.
    """

    def log(self, level: int, message: str, *args: Any) -> None:
        """One line."""
        log.log(logging.WARNING if level == logging.ERROR else level, message, *args)


_VOICE = _Voice()


class _Part(NamedTuple):
    """One address of a KAFKA_URL."""

    server: str
    scheme: str
    user: str
    password: str


def _parse_one(number: int, part: str) -> _Part:
    """Nothing of ``part`` goes into an error: any piece of it could be one of a password that was not encoded."""

    def wrong(why: str) -> ConfigurationError:
        return ConfigurationError(f"address {number} of KAFKA_URL {why}")

    try:
        address: SplitResult = urlsplit(part if "://" in part else f"kafka://{part}")
        host, port = address.hostname, address.port or DEFAULT_PORT
    except ValueError:
        raise wrong("cannot be read: write scheme://host:port, a user and a password in it percent-encoded") from None
    if address.scheme not in _SCHEMES or not host:
        raise wrong(f"must read scheme://host:port, the scheme one of {', '.join(_SCHEMES)}")
    if address.path.strip("/") or address.query or address.fragment:
        raise wrong("has something behind the port; a user and a password must be percent-encoded")
    user, password = unquote(address.username or ""), unquote(address.password or "")
    if "sasl" in address.scheme and not (user and password):
        raise wrong(f"needs user and password: {address.scheme}://user:password@host:port")
    if "sasl" not in address.scheme and (user or password):
        raise wrong(f"has a user or a password, which {address.scheme}:// does not use; kafka+sasl+ssl:// does")
    server = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return _Part(server, address.scheme, user, password)


def _certificates(settings: Settings | None) -> Certificates:
    if settings is None:
        return Certificates()
    trusted, client, key = (
        # Files of variables have no line breaks; there they are written as two characters.
        pem.replace("\\n", "\n") if pem else None
        for pem in (settings.kafka_trusted_cert, settings.kafka_client_cert, settings.kafka_client_cert_key)
    )
    if bool(client) != bool(key):
        raise ConfigurationError("KAFKA_CLIENT_CERT and KAFKA_CLIENT_CERT_KEY belong together: set both, or none")
    check = settings.kafka_check_host_names
    if check is None:
        check = not trusted
    if not (check or trusted):
        raise ConfigurationError(
            "STREAMS_APP_KAFKA_CHECK_HOST_NAMES=no needs KAFKA_TRUSTED_CERT: without either, anybody may pass for your Kafka"
        )
    certificates = Certificates(trusted, client, key, check)
    certificates.context  # noqa: B018 - what cannot be used is said at once
    return certificates

"""TLS between the hosts of a launched cluster: a CA for this cluster alone, certificates by host.

Ray asks both sides of each gRPC connection for a certificate of one CA (`RAY_USE_TLS`). Addresses
of cloud machines are not known beforehand, so every host makes its own certificate before Ray
starts, with the CA that came with the token: whoever has a host has the cluster anyway.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

DAYS = 365
OWNER_ONLY = 0o600

# Runs on each host in front of `ray start`; the shell is bash, as Ray's launcher starts it.
MAKE_CERTIFICATE = (
    "cd {folder} && openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
    "-subj /CN=ray -keyout node.key -out node.csr 2>/dev/null && "
    "openssl x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days {days} "
    '-extfile <(echo "subjectAltName=DNS:localhost,DNS:$(hostname),IP:127.0.0.1'
    '$(printf ",IP:%s" $(hostname -I))") -out node.crt 2>/dev/null && chmod 600 node.key && cd - '
    ">/dev/null || exit 1"
)


def make_certificate(folder: str) -> str:
    """The shell command by which a host makes its certificate in `folder`."""
    return MAKE_CERTIFICATE.format(folder=folder, days=DAYS)


def new_keys(folder: Path) -> None:
    """A new CA in `folder`/tls, to ship, and a certificate of it for this machine beside it.

    Those that were there are replaced: hosts that still have the old ones are refused.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    ca_key, own_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = _certificate(ca_key, ca_key, None)
    shipped, own = folder / "tls", folder / "tls-here"
    for place in (shipped, own):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_key(shipped / "ca.key", ca_key)
    _write_certificate(shipped / "ca.crt", ca)
    _write_certificate(own / "ca.crt", ca)
    _write_key(own / "node.key", own_key)
    _write_certificate(own / "node.crt", _certificate(own_key, ca_key, ca))


def client_environment(folder: Path) -> dict[str, str]:
    """Variables under which this machine's plain `ray` commands reach the cluster."""
    own = folder / "tls-here"
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(own / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(own / "node.key"),
        "RAY_TLS_CA_CERT": str(own / "ca.crt"),
    }


def _certificate(
    key: EllipticCurvePrivateKey,
    issuer_key: EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
) -> x509.Certificate:
    """Signed by the issuer; a CA's own if there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ray" if issuer else "manta")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), loopback])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    path.write_bytes(certificate.public_bytes(Encoding.PEM))

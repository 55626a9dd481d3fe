"""Makes what an authenticated federation needs: a certificate authority, the SuperLink's certificate, a key a node.

The folder of a federation::

    ca/ca.key                        signs certificates; keep it off every server
    superlink/ca.crt server.pem server.key
    nodes/<name>/ca.crt key key.pub  what one SuperNode needs; the private key goes nowhere else

Nodes check the SuperLink by its certificate (TLS); the SuperLink knows nodes by their public keys, which are
registered with it.
"""

import contextlib
import inspect
import ipaddress
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ssfl_app.comm.node_config import check_name
from ssfl_app.options import ConfigError

CA_VALID = timedelta(days=3650)
_EARLY = timedelta(hours=1)
_PEM = serialization.Encoding.PEM
_USAGES = inspect.signature(x509.KeyUsage).parameters  # the names of the nine usages of a key (RFC 5280)
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def private(folder: Path) -> Path:
    """Make a folder of a federation that its account alone may enter, whatever the umask is; return it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(PermissionError):  # somebody else's, who says who may enter it
        folder.chmod(0o700)
    return folder


def check_host(host: object, key: str) -> str:
    """Return a host name (RFC 1123) or IP address; ConfigError: it is neither, and the message begins with `key`."""
    if isinstance(host, str) and "%" not in host:  # the name of an interface, which may be anything
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(host))
        labels = host.removesuffix(".").split(".")
        # The last one has a letter: 1.2.3 and 1.2.3.999 are addresses that are wrong.
        if len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return host
    raise ConfigError(f"{key} is {host!r}; it is a host name, superlink.example.org, or an IP address")


def make_authority(folder: Path, valid: timedelta = CA_VALID) -> None:
    """Make ``ca/ca.key`` and ``ca/ca.crt`` in the folder of a federation, unless they are there.

    Raises
    ------
    ConfigError
        There is a certificate whose key is elsewhere: another one would not be that which nodes trust.
    """
    home = folder / "ca"
    if (home / "ca.key").exists():
        return
    if (home / "ca.crt").exists():
        raise ConfigError(
            f"{home / 'ca.key'} is not there; it is the key of ca.crt beside it, which nodes trust: go where that is"
        )
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _certificate("ssfl federation CA", None, key.public_key(), valid)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = {name: name in ("key_cert_sign", "crl_sign", "digital_signature") for name in _USAGES}
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private(home)
    _write_key(home / "ca.key", key, serialization.PrivateFormat.PKCS8)
    (home / "ca.crt").write_bytes(certificate.public_bytes(_PEM))


def make_server(folder: Path, hosts: Sequence[str], valid: timedelta) -> None:
    """Make the SuperLink's key and certificate, valid from now on; new ones if there are some already.

    `hosts` are names and IP addresses under which nodes and users reach the SuperLink.

    Raises
    ------
    ConfigError
        There is no host, or no authority to sign with.
    """
    if not hosts:
        raise ConfigError("hosts is empty; it is one name or address of the SuperLink or more")
    authority, signer = _authority(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    # Whom it is for stands in the alternative names alone: a common name holds 64 letters, a host's up to 253.
    builder = _certificate("ssfl SuperLink", authority.subject, key.public_key(), valid)
    builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    certificate = builder.sign(signer, hashes.SHA256())
    home = private(folder / "superlink")
    _write_key(home / "server.key", key, serialization.PrivateFormat.PKCS8)
    (home / "server.pem").write_bytes(certificate.public_bytes(_PEM))
    shutil.copy(folder / "ca" / "ca.crt", home / "ca.crt")


def make_node(folder: Path, name: str) -> Path:
    """Make the key pair of a node (P-384, OpenSSH) unless it is there; return the node's folder."""
    private(folder / "nodes")
    home = private(folder / "nodes" / check_name(name, "the name of a node"))
    if not (home / "key").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (home / "key.pub").write_bytes(public + b"\n")
        _write_key(home / "key", key, serialization.PrivateFormat.OpenSSH)
    if (folder / "ca" / "ca.crt").exists():
        shutil.copy(folder / "ca" / "ca.crt", home / "ca.crt")
    return home


def is_for(folder: Path, hosts: Sequence[str], valid: timedelta | None) -> bool:
    """Return whether the SuperLink's certificate is there and made for these hosts.

    With `valid` also whether it was made for so long and has not ended.
    """
    there = all((folder / "superlink" / name).exists() for name in ("server.key", "server.pem"))
    if not there or hosts_of(folder) != list(hosts):
        return False
    made = _server(folder)
    begin, end = made.not_valid_before_utc, made.not_valid_after_utc
    return valid is None or (end - begin == valid + _EARLY and end > datetime.now(UTC))


def expires(folder: Path) -> datetime:
    """Return when the SuperLink's certificate ends."""
    return _server(folder).not_valid_after_utc


def hosts_of(folder: Path) -> list[str]:
    """Return the names and addresses that the SuperLink's certificate is made for."""
    names = _server(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _server(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "superlink" / "server.pem").read_bytes())


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    home = folder / "ca"
    if not (home / "ca.key").exists():
        raise ConfigError(f"{home / 'ca.key'} is not there; it is the key that signs certificates: make it first")
    key = serialization.load_pem_private_key((home / "ca.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{home / 'ca.key'} is {type(key).__name__}; it is an elliptic-curve key")
    return x509.load_pem_x509_certificate((home / "ca.crt").read_bytes()), key


def _certificate(
    subject: str, issuer: x509.Name | None, public: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    """Return the beginning of a certificate; without an issuer it is its own."""
    # Back-dated: machines whose clocks differ a little agree that it has begun.
    now, name = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(issuer or name).public_key(public)
    made = made.serial_number(x509.random_serial_number())
    return made.not_valid_before(min(now, now + valid) - _EARLY).not_valid_after(now + valid)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    # Made with its mode: there is no moment in which others could read it.
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(_PEM, form, serialization.NoEncryption()))

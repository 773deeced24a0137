"""Signatures: who vouches for a gate report, a release and an entry of the audit log.

    keys = Keys(home / "keys")
    bundle = keys.sign_folder(folder)              # model-signing, offline: a Sigstore bundle over every file's SHA-256
    keys.verify_folder(folder, bundle, "release 1a2b3c4d")

    keys/signing.key      the private key, mode 0600; ONEREWARD_SIGNING_KEY names another file
    keys/trusted/*.pub    public keys whose signatures are believed, named by fingerprint; consumers need these alone
    keys/head-<name>.json how far the audit log of <name> went, signed (ops/audit.py)

A home without any key gets a pair of its own when something is first signed. One that trusts keys but holds no private key
can verify and not sign: a lost key is never replaced in silence. What this separates is said in docs/promotion.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from infra.disk import no_space, writing
from models.errors import DiskFull, SignatureRefused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

KEY_VARIABLE = "ONEREWARD_SIGNING_KEY"
REMEDY = "Set ONEREWARD_SIGNING_KEY to the private key, or sign where it is kept (docs/promotion.md)."
UNQUOTED = str.maketrans("", "", '[]"\\')


@dataclass(frozen=True)
class Keys:
    """The key pair and the trusted public keys of a home. Raises SignatureRefused, ConfigError or DiskFull."""

    folder: Path

    @property
    def private(self) -> Path:
        """Where the private key is, or would be."""
        return Path(os.environ.get(KEY_VARIABLE) or self.folder / "signing.key")

    @property
    def trusted(self) -> dict[str, Path]:
        """Fingerprint -> file of every trusted public key."""
        return {path.stem: path for path in sorted((self.folder / "trusted").glob("*.pub"))}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the signing key's public half. A home without any key makes its pair now."""
        return _fingerprint(_public_pem(self._signer()))

    def create(self) -> str:
        """Make the key pair and trust it; the fingerprint. Raises SignatureRefused where there is a private key already."""
        if self.private.exists():
            raise SignatureRefused(f"There is a private key at {self.private}.", "Replace it with `onereward keys rotate`.")
        return self._make()

    def rotate(self) -> tuple[str, str]:
        """Make a new pair in the place of the present one, whose public half stays trusted; the old and the new fingerprint."""
        return self.fingerprint, self._make()

    def _make(self) -> str:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = _public_pem(key)
        with writing(self.private, REMEDY):
            self.private.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(self.folder / "trusted" / f"{_fingerprint(public)}.pub", public, 0o644)
            _replace(self.private, pem, 0o600)
        return _fingerprint(public)

    def sign_folder(self, folder: Path) -> str:
        """A signature over every file of a folder, as model-signing's bundle (JSON)."""
        from model_signing.signing import Config

        self._signer()
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            bundle = Path(temporary) / "bundle.json"
            Config().set_hashing_config(_every_file()).use_elliptic_key_signer(private_key=self.private).sign(folder, bundle)
            return bundle.read_text()

    def verify_folder(self, folder: Path, bundle: str, what: str) -> None:
        """Raises SignatureRefused, naming `what`, unless a trusted key signed exactly these files."""
        from model_signing.verifying import Config

        if not bundle:
            raise SignatureRefused(f"{what} is not signed.", "Make it again, where the signing key is held.")
        try:
            signer = json.loads(bundle)["verificationMaterial"]["publicKey"]["hint"]  # the key's fingerprint
            with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                file = Path(temporary) / "bundle.json"
                file.write_text(bundle)
                verifier = Config().set_hashing_config(_every_file()).use_elliptic_key_verifier(public_key=self.trusted[signer])
                verifier.verify(folder, file)
        except Exception as error:  # no JSON, an unknown key, a wrong signature, other files: each has a class of its own
            if no_space(error):
                raise DiskFull(f"No space left in {self.folder} to verify {what}.", "Free some space and try again.") from error
            said = str(error).split(": Expected")[0].translate(UNQUOTED)  # the library gives a list with digests
            why = "its key is not trusted here" if isinstance(error, KeyError) else said or type(error).__name__
            remedy = f"Trusted are the keys in {self.folder / 'trusted'}; what was altered must be made again."
            raise SignatureRefused(f"The signature of {what} does not hold: {why}.", remedy) from error

    def sign(self, text: bytes) -> str:
        """A signature over a short text: `<fingerprint>:<base64 of ECDSA with SHA-256>`."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        key = self._signer()
        return f"{_fingerprint(_public_pem(key))}:{base64.b64encode(key.sign(text, ECDSA(hashes.SHA256()))).decode()}"

    def signed(self, text: bytes, signature: str) -> bool:
        """Whether a trusted key made this signature over this text."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        fingerprint, _, value = signature.partition(":")
        public = self.trusted.get(fingerprint)
        if public is None:
            return False
        try:
            _load_public(public).verify(base64.b64decode(value, validate=True), text, ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _signer(self) -> EllipticCurvePrivateKey:
        """The private key, its public half trusted. Made first where the home has no key at all."""
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        with writing(self.folder, REMEDY):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with filelock.FileLock(self.folder / ".lock"):
            if not self.private.exists() and not self.trusted:
                self.create()
        try:
            key = load_pem_private_key(self.private.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "it is no unencrypted PEM key"
            raise SignatureRefused(f"There is no usable signing key at {self.private}: {reason}.", REMEDY) from error
        if not isinstance(key, EllipticCurvePrivateKey):
            raise SignatureRefused(f"{self.private} is no elliptic curve key.", "Make one with `onereward keys create`.")
        public = _public_pem(key)
        if not self.trusted:
            _replace(self.folder / "trusted" / f"{_fingerprint(public)}.pub", public, 0o644)
        if _fingerprint(public) not in self.trusted:
            remedy = f"Put its public half into {self.folder / 'trusted'}, named {_fingerprint(public)}.pub."
            raise SignatureRefused(f"The home does not trust the signing key {self.private}.", remedy)
        return key


def _every_file() -> Any:
    """How model-signing is to hash a folder: it would leave out git's own files, which could then be swapped."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _public_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _load_public(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = path.read_bytes()
    key = load_pem_public_key(pem)
    if not isinstance(key, EllipticCurvePublicKey) or _fingerprint(pem) != path.stem:
        raise SignatureRefused(f"{path} is no elliptic curve key of that fingerprint.", "Put the right public key there, or remove it.")
    return key


def _fingerprint(public_pem: bytes) -> str:
    return hashlib.sha256(public_pem).hexdigest()


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole, never readable by others before it has its mode."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(draft, mode)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)

"""Where the lakeFS server is, who asks, and the client package that asks it.

access = Access.from_env()          # LAKEFS_ENDPOINT, LAKEFS_ACCESS_KEY_ID, LAKEFS_SECRET_ACCESS_KEY
connection = connect(access, urllib3.Retry(6))
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import urllib3

from models.errors import ConfigError

ENDPOINT = ("LAKEFS_ENDPOINT", "LAKECTL_SERVER_ENDPOINT_URL")
KEY_ID = ("LAKEFS_ACCESS_KEY_ID", "LAKECTL_CREDENTIALS_ACCESS_KEY_ID")
SECRET = ("LAKEFS_SECRET_ACCESS_KEY", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Access:
    """Where the server is and who asks. The key pair does not appear in its text form."""

    endpoint: str
    key_id: str = field(repr=False)
    secret: str = field(repr=False)

    @classmethod
    def from_env(cls) -> Access:
        """Raises ConfigError for what is not set and for an endpoint that is no plain URL."""
        endpoint, key_id, secret = (_variable(names) for names in (ENDPOINT, KEY_ID, SECRET))
        endpoint = checked_endpoint(endpoint)
        for names, value in ((KEY_ID, key_id), (SECRET, secret)):
            if not value:
                raise ConfigError(f"{names[0]} is not set.", f"lakeFS at {endpoint} needs a key pair, in {KEY_ID[0]} and {SECRET[0]}.")
        return cls(endpoint, key_id, secret)


def _variable(names: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def checked_endpoint(endpoint: str) -> str:
    """The endpoint without a trailing slash. Raises ConfigError for what is no URL or holds a user or password."""
    remedy = f"Write {ENDPOINT[0]} like https://lakefs.example.com."
    if not endpoint:
        raise ConfigError(f"{ENDPOINT[0]} is not set.", remedy)
    try:
        url = urllib3.util.parse_url(endpoint)
    except urllib3.exceptions.LocationParseError:
        url = urllib3.util.Url()
    if url.auth:
        raise ConfigError(f"{ENDPOINT[0]} holds a user or a password.", f"{remedy} Credentials have variables of their own.")
    if url.scheme not in ("http", "https") or not url.host or any(c.isspace() for c in endpoint):
        raise ConfigError(f"{endpoint} is no URL.", remedy)
    return endpoint.rstrip("/").removesuffix("/api/v1")


class Connection(NamedTuple):
    """A generated client: its API objects, its request models and the base class of its exceptions."""

    client: Any
    models: Any
    failure: type[Exception]


def connect(access: Access, retries: urllib3.Retry) -> Connection:
    """Through `lakefs` and `lakefs-sdk`. Raises ConfigError where they are not installed."""
    try:
        import lakefs_sdk
        from lakefs.client import Client
    except ImportError as error:
        raise ConfigError("The packages for lakeFS are not installed.", 'Run pip install -e ".[lakefs]".') from error
    client = Client(host=access.endpoint, username=access.key_id, password=access.secret)
    client.config.retries = retries
    sdk = client.sdk_client
    sdk.objects_api.api_client.rest_client = lakefs_sdk.rest.RESTClientObject(client.config, maxsize=32)  # with the retries
    return Connection(sdk, lakefs_sdk, lakefs_sdk.exceptions.OpenApiException)

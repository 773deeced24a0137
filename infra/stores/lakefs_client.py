"""The same calls through `lakefs-client`, the deprecated package, for machines that have no other: LAKEFS_CLIENT=lakefs-client.

Its API classes have the names of `lakefs-sdk`'s; only how they are made differs. Its own notice says not to use it any more.
"""

from __future__ import annotations

import urllib3

from infra.stores.lakefs_access import Access, Connection
from models.errors import ConfigError


def connect(access: Access, retries: urllib3.Retry) -> Connection:
    """Through `lakefs-client`. Raises ConfigError where it is not installed."""
    try:
        import lakefs_client
        import lakefs_client.models
        from lakefs_client.client import LakeFSClient
    except ImportError as error:
        raise ConfigError(
            "The package lakefs-client is not installed.", 'Run pip install -e ".[lakefs-client]", or unset LAKEFS_CLIENT.'
        ) from error
    configuration = lakefs_client.Configuration(host=access.endpoint, username=access.key_id, password=access.secret)
    configuration.retries, configuration.connection_pool_maxsize = retries, 32
    return Connection(LakeFSClient(configuration), lakefs_client.models, lakefs_client.exceptions.OpenApiException)

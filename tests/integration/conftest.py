"""What the integration tests share: one S3 server, and helpers of the unit tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, str]]:
    """An S3 server with bucket `manta`; gives the environment that a client of it needs.

    One for the session, and its address in this process's environment: fsspec keeps one client
    for equal arguments, so that a second server at another address would never be asked.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "*",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="manta")
        yield environment
    server.stop()

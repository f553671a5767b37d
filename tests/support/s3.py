# SPDX-License-Identifier: Apache-2.0
"""A local S3 server with one bucket, and what it was asked. Imported before tests fork: it takes a second, and starts nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "models"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIACANARYKEY", "AWS_SECRET_ACCESS_KEY": "canary-secret", "AWS_DEFAULT_REGION": "us-east-1"}
OUTER = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


class Store:
    """The server as a test sees it.

    env:    what a process needs to reach it
    client: of boto3
    asked:  names of the requests that changed something, with their object, of every `watched` client
    """

    def __init__(self, env: dict[str, str], client: Any) -> None:
        self.env = env
        self.client = client
        self.asked: list[tuple[str, str]] = []

    def watched(self, client: Any) -> Any:
        """`client`, whose requests are noted."""
        for request in ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"):
            client.meta.events.register(
                f"provide-client-params.s3.{request}",
                lambda params, model, **rest: self.asked.append((model.name, params["Key"])),
            )
        return client

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket, by name."""
        listed = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {one["Key"]: self.client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read() for one in listed}


@contextmanager
def s3_server() -> Iterator[Store]:
    """A server in a thread of this process; the environment points to it, also for what this process starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {**CREDENTIALS, "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    before = dict(os.environ)
    for name in OUTER:
        os.environ.pop(name, None)
    os.environ.update(env)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield Store(env, client)
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)

# SPDX-License-Identifier: Apache-2.0
"""Files to and from one place in an S3 store, in parts and verified."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron import fault_injection
from megatron.atomic_io import Entry, new_digest
from megatron.errors import BackendError, CheckpointError, ConfigError
from megatron.log import get_logger
from megatron.secrets import redact

log = get_logger(__name__)

KEY = "s3_path"
DIGEST = "xxh128"
"""Under this name an object keeps its file's digest (Entry)."""

MOST_PARTS = 10_000
"""Of one object (Amazon S3 user guide, multipart upload limits)."""

ATTEMPTS = 6
"""Tries of one request, with growing pauses, before it counts as failed."""


class Stopped(Exception):
    """The process is about to end; what was sent stays, and the next start goes on from there."""


@dataclass(frozen=True)
class Address:
    """A bucket, and what the names of its objects begin with (without slashes at the ends)."""

    bucket: str
    prefix: str = ""

    @classmethod
    def of(cls, text: str) -> Address:
        """
        >>> Address.of("s3://models/run/"), Address.of("s3://models")
        (Address(bucket='models', prefix='run'), Address(bucket='models', prefix=''))
        """
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        return cls(bucket, prefix.strip("/"))

    def below(self, name: str) -> Address:
        """The place one folder further down."""
        return Address(self.bucket, f"{self.prefix}/{name}".strip("/"))

    def key(self, name: str) -> str:
        """Name of the object of a file."""
        return f"{self.prefix}/{name}".lstrip("/")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def require_boto3() -> None:
    """Raise BackendError where the package is absent."""
    try:
        import boto3  # noqa: F401
    except ImportError as error:
        fix = "bash setup_uv_env.sh --extra s3 (or: pip install 'megatron-neox[s3]'), or remove s3_path"
        raise BackendError(f"uploads to S3 need the package boto3: {error}", where=KEY, fix=fix) from error


def open_client() -> Any:
    """A client with the credentials, region and endpoint found in boto3's usual places.

    Raises BackendError without boto3, ConfigError without credentials.
    """
    require_boto3()
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run `aws configure`; AWS_ENDPOINT_URL_S3 names another store"
    try:
        session = boto3.session.Session()
        if session.get_credentials() is None:
            raise ConfigError("no credentials for S3 were found", where=KEY, fix=fix)
        retries = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
        return session.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 cannot be used: {redact(str(error))}", where=KEY, fix=fix) from error


@dataclass(frozen=True, kw_only=True)
class S3Prefix:
    """The objects under one address.

    part_bytes: of one part of a large file; so much of each file under way is held in memory
    stopped:    whether to give up between two parts
    moved:      is told the number of bytes of each part that is in the store
    """

    client: Any
    address: Address
    part_bytes: int
    stopped: Callable[[], bool] = lambda: False
    moved: Callable[[int], None] = lambda count: None

    def check(self) -> None:
        """Raise ConfigError where the bucket is absent or closed to us; a store that cannot be reached now may be reached later."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.head_bucket(Bucket=self.address.bucket)
        except ClientError as error:
            status = _status(error)
            if status >= 500:
                log.error("S3 does not answer properly; uploads are tried all the same: %s", redact(str(error)))
                return
            what = {404: "there is no such bucket", 403: "access to the bucket is denied"}.get(status, redact(str(error)))
            fix = "correct s3_path, create the bucket, or use credentials that may list, read and write it"
            raise ConfigError(f"{self.address} cannot be used: {what}", where=KEY, fix=fix) from error
        except BotoCoreError as error:
            log.error("S3 cannot be reached; uploads are tried all the same: %s", redact(str(error)))

    def has(self, name: str, entry: Entry, checksum: str | None = None) -> bool:
        """Whether the object of a file is there with the right size and digest.

        checksum: what the store's own checksum must be, where it keeps one
        """
        head = _unless_absent(lambda: self.client.head_object(**self._object(name), ChecksumMode="ENABLED"))
        if head is None:
            return False
        if head["ContentLength"] != entry.bytes or head.get("Metadata", {}).get(DIGEST) != entry.xxh128:
            return False
        stored = head.get("ChecksumSHA256")
        return stored is None or checksum is None or stored.partition("-")[0] == checksum

    def send(self, path: Path, name: str, entry: Entry) -> bool:
        """Make the object of a file be there; returns whether anything had to be sent.

        entry: what the file must hold
        Raises CheckpointError when it does not, or when the store does not keep what it was sent.
        """
        size = max(self.part_bytes, -(-entry.bytes // MOST_PARTS))
        if self.has(name, entry) and self.has(name, entry, self._checksum_of(path, entry, size)):
            self.moved(entry.bytes)
            return False
        # Twice: an unfinished upload of an earlier content of the file keeps that one's digest, whatever its parts.
        for _ in range(2):
            checksum = self._put(path, name, entry) if entry.bytes <= size else self._put_parts(path, name, entry, size)
            if self.has(name, entry, checksum):
                return True
        raise CheckpointError("the store does not hold what it was sent", where=f"{self.address}/{name}", fix="see the store's own log")

    def write(self, name: str, content: bytes) -> None:
        """A small object of any content."""
        self.client.put_object(**self._object(name), Body=content, ChecksumSHA256=_base64(_sha256(content)))

    def read(self, name: str) -> bytes | None:
        """A small object; None when it is not there."""
        found = _unless_absent(lambda: self.client.get_object(**self._object(name)))
        return None if found is None else bytes(found["Body"].read())

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        self.client.delete_object(**self._object(name))

    def _object(self, name: str) -> dict[str, str]:
        """What a request for the object of a file names."""
        return {"Bucket": self.address.bucket, "Key": self.address.key(name)}

    def _checksum_of(self, path: Path, entry: Entry, size: int) -> str:
        if entry.bytes <= size:
            return _base64(_sha256(path.read_bytes()))
        return _combined([_sha256(piece) for piece in _pieces(path, size)])

    def _put(self, path: Path, name: str, entry: Entry) -> str:
        self._go_on()
        content = path.read_bytes()
        digest, seen = _sha256(content), new_digest()
        seen.update(content)
        if seen.hexdigest() != entry.xxh128:
            raise _damaged(path)
        sums = {"ChecksumSHA256": _base64(digest), "Metadata": {DIGEST: entry.xxh128}}
        self.client.put_object(**self._object(name), Body=content, **sums)
        self.moved(len(content))
        return _base64(digest)

    def _put_parts(self, path: Path, name: str, entry: Entry, size: int) -> str:
        where = self._object(name)
        upload = self._unfinished(where["Key"])
        if upload is None:
            made = self.client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256", Metadata={DIGEST: entry.xxh128})
            upload, there = str(made["UploadId"]), {}
        else:
            there = self._parts_of(where, upload)
        whole, digests, parts = new_digest(), [], []
        for number, piece in enumerate(_pieces(path, size), start=1):
            self._go_on()
            whole.update(piece)
            digest = _sha256(piece)
            tag = _tag_of(there.get(number), piece, digest)
            if tag is None:
                sent = {"UploadId": upload, "PartNumber": number, "Body": piece, "ChecksumSHA256": _base64(digest)}
                tag = str(self.client.upload_part(**where, **sent)["ETag"])
            digests.append(digest)
            parts.append({"PartNumber": number, "ETag": tag, "ChecksumSHA256": _base64(digest)})
            self.moved(len(piece))
        if whole.hexdigest() != entry.xxh128:
            self.client.abort_multipart_upload(**where, UploadId=upload)
            raise _damaged(path)
        self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
        return _combined(digests)

    def _unfinished(self, key: str) -> str | None:
        """The newest upload of a key that was begun and not ended; older ones are thrown away."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.address.bucket, Prefix=key)
        found = sorted((u for page in pages for u in page.get("Uploads", ()) if u["Key"] == key), key=lambda upload: upload["Initiated"])
        for upload in found[:-1]:
            self.client.abort_multipart_upload(Bucket=self.address.bucket, Key=key, UploadId=upload["UploadId"])
        return str(found[-1]["UploadId"]) if found else None

    def _parts_of(self, where: dict[str, str], upload: str) -> dict[int, dict[str, Any]]:
        pages = self.client.get_paginator("list_parts").paginate(**where, UploadId=upload)
        return {int(part["PartNumber"]): part for page in pages for part in page.get("Parts", ())}

    def _go_on(self) -> None:
        if self.stopped():
            raise Stopped
        fault_injection.point("upload")


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(size):
            # A raw read gives at most 2 GiB, and may give less than asked for.
            while len(piece) < size and (more := file.read(size - len(piece))):
                piece += more
            yield piece


def _tag_of(part: dict[str, Any] | None, piece: bytes, digest: bytes) -> str | None:
    """The tag of a part that is in the store already; None when there is none or it holds something else."""
    if part is None or part["Size"] != len(piece):
        return None
    checksum, tag = part.get("ChecksumSHA256"), str(part["ETag"])
    if checksum is not None:
        return tag if checksum == _base64(digest) else None
    # Stores that list no checksums give the MD5 as tag. Where it is something else, the part is sent again.
    return tag if tag.strip('"') == hashlib.md5(piece, usedforsecurity=False).hexdigest() else None


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _combined(digests: Sequence[bytes]) -> str:
    """S3's checksum of an object made of parts: the digest of the parts' digests."""
    return _base64(_sha256(b"".join(digests)))


def _unless_absent(request: Callable[[], Any]) -> Any:
    """The store's answer; None when the object is not there."""
    from botocore.exceptions import ClientError

    try:
        return request()
    except ClientError as error:
        if _status(error) == 404:
            return None
        raise


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError("the file is not what its manifest says, so it is not uploaded", where=str(path), fix="check the disk")

"""Objects of S3 and of what answers like it, by Amazon's own client: what gcs.py has for Google's.

AWS_ENDPOINT_URL names another server, as of MinIO, Cloudflare or Backblaze; credentials, region and
profile come from where boto3 looks for them. What fails for a moment is tried again.
"""

import contextlib
import errno
import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deit_jax.storage.objects import CONNECT, ENOPKG, Conflict, Found, explained, one_line, silence

NO_PACKAGE = "s3:// needs another package; pip install 'deit_jax[s3]'"
TRIES = 10
GONE = ("404", "NoSuchKey", "NotFound")
CHANGED = ("412", "PreconditionFailed", "ConditionalRequestConflict", "409")


class S3Objects:
    """The objects of all buckets that the machine's credentials reach; names are `bucket/a/b`.

    A generation is an object's ETag, 0 where there must be none yet.
    """

    def read(self, name: str, end: int | None = None) -> tuple[bytes, Any]:
        """Return an object's content, or its first `end` bytes, and its generation."""
        with _explained(name):
            part = {"Range": f"bytes=0-{end - 1}"} if end else {}
            try:
                got = _client(os.getpid()).get_object(**_key(name), **part)
            except Exception as error:
                if _code(error) in ("416", "InvalidRange"):  # of an empty object
                    return b"", 0
                raise
            return got["Body"].read(), got["ETag"]

    def sha256(self, name: str) -> str:
        """Return the checksum of an object's content, which is read in pieces."""
        digest = hashlib.sha256()
        with _explained(name):
            for piece in _client(os.getpid()).get_object(**_key(name))["Body"].iter_chunks(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def put(
        self, name: str, data: bytes, generation: Any = None, patience: float | None = None
    ) -> Any:
        """Write an object and return its generation; raise Conflict if it is not of the given."""
        match: dict[str, str] = {}
        if generation is not None:
            match = {"IfMatch": generation} if generation else {"IfNoneMatch": "*"}
        with _explained(name):
            return _client(os.getpid()).put_object(**_key(name), Body=data, **match)["ETag"]

    def state(self, name: str) -> tuple[Any, float] | None:
        """Return an object's generation and the Unix time of its last change; None without it."""
        try:
            with _explained(name):
                head = _client(os.getpid()).head_object(**_key(name))
        except FileNotFoundError:
            return None
        return head["ETag"], head["LastModified"].timestamp()

    def found(self, prefix: str, limit: int | None = None) -> Iterator[Found]:
        """Yield the objects whose names begin so, in the order of their names."""
        bucket, _, path = prefix.partition("/")
        with _explained(prefix):
            pages = _client(os.getpid()).get_paginator("list_objects_v2")
            options = {"PaginationConfig": {"MaxItems": limit}} if limit else {}
            for page in pages.paginate(Bucket=bucket, Prefix=path, **options):
                for one in page.get("Contents", ()):
                    yield Found(f"{bucket}/{one['Key']}", one["Size"], one["ETag"])

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the last parts of the names of objects and of folders right below `prefix`/."""
        bucket, _, path = prefix.partition("/")
        path = f"{path.rstrip('/')}/" if path else ""
        objects, folders = [], []
        with _explained(prefix):
            pages = _client(os.getpid()).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=path, Delimiter="/"):
                objects += [one["Key"][len(path) :] for one in page.get("Contents", ())]
                folders += [o["Prefix"][len(path) : -1] for o in page.get("CommonPrefixes", ())]
        return sorted(filter(None, objects)), sorted(folders)

    def download(self, name: str, path: Path, generation: Any = None) -> None:
        """Copy an object, of a generation, to a file of this machine, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}.tmp")
        key = _key(name)
        try:
            with _explained(name):
                client = _client(os.getpid())
                client.download_file(key["Bucket"], key["Key"], str(temporary))
                if generation and client.head_object(**key)["ETag"] != generation:
                    raise Conflict(errno.ESTALE, "it was changed meanwhile", f"s3://{name}")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def look(self, bucket: str) -> None:
        """Raise OSError unless there is such a bucket, and it may be asked."""
        with _explained(f"{bucket}/"):
            _client(os.getpid()).head_bucket(Bucket=bucket)

    def copy(self, old: str, new: str) -> None:
        """Make a copy of an object, which is not read here."""
        with _explained(old):
            _client(os.getpid()).copy(_key(old), **_key(new))

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError), _explained(name):
            _client(os.getpid()).delete_object(**_key(name))


def _key(name: str) -> dict[str, str]:
    bucket, _, path = name.partition("/")
    return {"Bucket": bucket, "Key": path}


@functools.lru_cache(maxsize=1)
def _client(process: int):
    """Return the client of this process: one that was forked must not share connections."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise OSError(ENOPKG, NO_PACKAGE) from None
    settings = Config(
        connect_timeout=CONNECT,
        read_timeout=silence(),
        retries={"max_attempts": TRIES, "mode": "adaptive"},
        max_pool_connections=64,
    )
    return boto3.client("s3", config=settings)


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _explained(name: str):
    """Make an OSError, which names the object, of what the client raises."""
    told = functools.partial(_told, bucket=name.partition("/")[0])
    return explained(f"s3://{name}", ("botocore", "boto3", "s3transfer"), told)


def _told(error: Exception, bucket: str) -> tuple[int, str] | None:
    """Return the errno and a text for what the client raised; None for a wrong generation."""
    code, line = _code(error), one_line(error)
    if code in CHANGED:
        return None
    if code == "NoSuchBucket":
        return errno.ENOENT, f"there is no bucket s3://{bucket}, or it is not yours to see"
    if code in GONE:
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return errno.EACCES, "no credentials for S3 on this machine; aws configure"
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return errno.EACCES, f"not allowed ({line}); look at the rights of the credentials"
    return errno.EIO, line

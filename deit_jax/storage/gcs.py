"""Objects of Google Cloud Storage, by Google's own client: read, put, list, copy, delete.

All raise OSError that names the object. What fails for a moment (429, 500, 502, 503, 504, lines
that break or hang) is tried again for ten minutes. STORAGE_EMULATOR_HOST names another server,
DEIT_GCS_TIMEOUT the seconds of silence after which a request counts as hanging.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from deit_jax.storage.objects import CONNECT, ENOPKG, Found, explained, one_line, silence

# gcsfs would ask for the kind of a bucket, and take another class of its own for some.
PLAIN = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
PATIENCE = 600.0  # seconds in which a request is tried again
NO_PACKAGE = "gs:// needs more packages; pip install 'deit_jax[gcs]'"

# Asked for credentials, this says that there are none on this machine, which we say ourselves.
logging.getLogger("google.auth").setLevel(logging.ERROR)


@functools.lru_cache(maxsize=1)
def prepare_libraries() -> None:
    """Let Orbax, by TensorStore and gcsfs, see what others write and end requests that hang."""
    limits = {  # of TensorStore, which waits for ever by itself
        "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": f"{CONNECT:.0f}",
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": f"{max(silence(), 1):.0f}",
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    }
    for name, value in (limits | PLAIN).items():
        os.environ.setdefault(name, value)
    try:
        from fsspec import config
    except ImportError:
        return  # told of where something is read
    ours = config.conf.setdefault("gcs", {})
    ours.setdefault("use_listings_cache", False)
    ours.setdefault("requests_timeout", silence())


class Objects:
    """The objects of all buckets that the machine's credentials reach; names are `bucket/a/b`."""

    def read(self, name: str, end: int | None = None) -> tuple[bytes, int]:
        """Return an object's content, or its first `end` bytes, and its generation."""
        with _explained(name):
            blob = self._blob(name)
            options = {"timeout": _timeout(), "retry": _retry()}
            try:
                data = blob.download_as_bytes(end=end and end - 1, raw_download=True, **options)
            except _errors().RequestRangeNotSatisfiable:  # of an empty object no range is there
                return b"", int(blob.generation or 0)
            return data, int(blob.generation or 0)

    def download(self, name: str, path: Path, generation: int | None = None) -> None:
        """Copy an object to a file of this machine, whole or not at all; its checksum must fit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}.tmp")
        try:
            with _explained(name):
                options = {"raw_download": True, "timeout": _timeout(), "retry": _retry()}
                self._blob(name, generation).download_to_filename(str(temporary), **options)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def sha256(self, name: str) -> str:
        """Return the checksum of an object's content, which is read in pieces."""
        digest = hashlib.sha256()
        with _explained(name):
            blob = self._blob(name)
            # What the bucket itself says of it is not compared: who asks does that, and better.
            options = {"raw_download": True, "checksum": None, "timeout": _timeout()}
            blob.download_to_file(_Digest(digest), retry=_retry(), **options)
        return digest.hexdigest()

    def put(
        self, name: str, data: bytes, generation: int | None = None, patience: float | None = None
    ) -> int:
        """Write an object and return its generation; try for `patience` seconds.

        With a `generation` (0: none yet) it must be of that one, or Conflict is raised.
        """
        with _explained(name):
            blob = self._blob(name)
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                if_generation_match=generation,
                timeout=_timeout(),
                retry=_retry() if patience is None else _retry().with_timeout(patience),
                checksum="crc32c",
            )
            return int(blob.generation)

    def state(self, name: str) -> tuple[int, float] | None:
        """Return an object's generation and the Unix time of its last change; None without it."""
        with _explained(name):
            bucket, _, path = name.partition("/")
            blob = self._client().bucket(bucket).get_blob(path, timeout=_timeout(), retry=_retry())
            return blob and (int(blob.generation), blob.updated.timestamp())

    def found(self, prefix: str, limit: int | None = None) -> Iterator[Found]:
        """Yield the objects whose names begin so, in the order of their names."""
        bucket, _, path = prefix.partition("/")
        with _explained(prefix, listing=True):
            for blob in self._client().list_blobs(
                bucket, prefix=path, max_results=limit, timeout=_timeout(), retry=_retry()
            ):
                yield Found(f"{bucket}/{blob.name}", int(blob.size or 0), int(blob.generation or 0))

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the last parts of the names of objects and of folders right below `prefix`/."""
        bucket, _, path = prefix.partition("/")
        path = f"{path.rstrip('/')}/" if path else ""
        with _explained(prefix, listing=True):
            found = self._client().list_blobs(
                bucket, prefix=path, delimiter="/", timeout=_timeout(), retry=_retry()
            )
            objects = [blob.name[len(path) :] for blob in found]  # the folders come with it
            folders = [name[len(path) : -1] for name in found.prefixes]
        return sorted(filter(None, objects)), sorted(folders)

    def look(self, bucket: str) -> None:
        """Raise OSError unless a bucket's own facts may be read, which Orbax does."""
        with _explained(f"{bucket}/", listing=True):
            self._client().get_bucket(bucket, timeout=_timeout(), retry=_retry())

    def copy(self, old: str, new: str) -> None:
        """Make a copy of an object, which is not read here."""
        (bucket, _, path), (to, _, target) = old.partition("/"), new.partition("/")
        with _explained(old):
            source = self._client().bucket(bucket)
            source.copy_blob(
                source.blob(path),
                self._client().bucket(to),
                target,
                timeout=_timeout(),
                retry=_retry(),
            )

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with _explained(name), contextlib.suppress(FileNotFoundError), _explained(name):
            self._blob(name).delete(timeout=_timeout(), retry=_retry())

    def _blob(self, name: str, generation: int | None = None):
        bucket, _, path = name.partition("/")
        return self._client().bucket(bucket).blob(path, generation=generation)

    @staticmethod
    def _client():
        with _MAKING:
            return _client(os.getpid())  # a process that was forked must not share connections


class _Digest:
    """A file that only counts what is written to it."""

    def __init__(self, digest):
        self._digest, self._size = digest, 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size


_MAKING = threading.Lock()


@functools.lru_cache(maxsize=1)
def _client(process: int):
    try:
        import requests
        from google.cloud import storage
    except ImportError:
        raise OSError(ENOPKG, NO_PACKAGE) from None
    client = storage.Client()
    # Several threads of a loader read at once: as many lines are kept open.
    adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=64)
    for scheme in ("https://", "http://"):
        client._http.mount(scheme, adapter)
    return client


def _errors():
    from google.api_core import exceptions

    return exceptions


@functools.lru_cache(maxsize=1)
def _retry():
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(PATIENCE).with_delay(initial=0.5, maximum=20.0)


def _timeout() -> tuple[float, float]:
    return CONNECT, silence()


def _explained(name: str, listing: bool = False):
    """Make an OSError, which names the object, of what the client raises."""
    told = functools.partial(_told, name=name, listing=listing)
    return explained(f"gs://{name}", ("google", "requests", "urllib3"), told)


# The second for Orbax, which asks what kind of bucket it is.
ROLES = "roles/storage.objectUser and roles/storage.legacyBucketReader"
_SIGN_IN = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=FILE"


def _told(error: Exception, name: str, listing: bool) -> tuple[int, str] | None:
    """Return the errno and a text for what the client raised; None for a wrong generation."""
    code = getattr(error, "code", None)
    code = getattr(code, "value", code)  # of an HTTPStatus
    bucket = name.partition("/")[0]
    if code == 412:
        return None
    if code == 404:
        if listing or "bucket" in str(error).lower():
            return errno.ENOENT, f"there is no bucket gs://{bucket}, or it is not yours to see"
        return errno.ENOENT, os.strerror(errno.ENOENT)
    if code == 401 or type(error).__name__ == "DefaultCredentialsError":
        return errno.EACCES, f"no credentials for Google Cloud on this machine; {_SIGN_IN}"
    if code == 403:
        return errno.EACCES, f"not allowed ({one_line(error)}); ask for {ROLES}"
    if type(error).__name__ == "RefreshError":
        return errno.EACCES, f"the credentials have expired ({one_line(error)}); {_SIGN_IN}"
    return errno.EIO, one_line(error)

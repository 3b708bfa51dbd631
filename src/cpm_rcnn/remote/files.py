"""Remote files through the local cache."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpm_rcnn.errors import UserError, check_file
from cpm_rcnn.remote.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, Cache
from cpm_rcnn.remote.transfer import RemoteFile, describe, download
from cpm_rcnn.remote.urls import Url, check_url, is_url

_log = logging.getLogger(__name__)


def read(url: Url, checked_since: float) -> bytes:
    """The content of a small file, such as an image.

    Args:
        url: the file.
        checked_since: a time (seconds since 1970). The server is not asked whether the file has changed if that was
            done after this time, by any process.

    Raises:
        MissingError: there is no such file.
        UnavailableError: the server refuses or does not answer.
        UserError: the package for URLs of this kind is not installed.
    """
    found = Cache.from_environment().find(url.text, checked_since=checked_since)
    if found is not None and (content := _content(found)) is not None:
        return content
    file = describe(url)
    return read_version(url.text, file.version, lambda: b"".join(download(file)))


def read_version(key: str, version: str, fetch: Callable[[], bytes]) -> bytes:
    """A content from the cache, or else from ``fetch``; then it is stored, unless it is too large.

    Args:
        key: name of the content.
        version: its version.
        fetch: gets it from the server.
    """
    cache = Cache.from_environment()
    found = cache.find(key, version)
    if found is not None and (content := _content(found)) is not None:
        return content
    content = fetch()
    if len(content) <= cache.limit:
        try:
            cache.store(key, version, [content])
        except OSError as error:
            _warn_of_cache(cache.folder, error.strerror or str(error))
    return content


def local_copy(url: Url) -> Path:
    """A copy of a file in the cache. The server is asked for its version.

    If several processes need it, one of them downloads it.

    Raises:
        MissingError: there is no such file.
        UnavailableError: the server refuses or does not answer.
        UserError: the cache cannot hold the file, or the package for URLs of this kind is not installed.
    """
    cache = Cache.from_environment()
    file = describe(url)
    try:
        with cache.downloading(url.text):
            found = cache.find(url.text, file.version)
            return found or _stored(cache, file)
    except OSError as error:
        reason = f"the cache {cache.folder} cannot be written ({error.strerror or error})"
        raise UserError(f"{url}: {reason}; set {FOLDER_VARIABLE} to another folder") from error


def local_file(argument: str, value: Any, allowed: str = "") -> Path:
    """An existing local file, or the local copy of the file that a URL names.

    Args:
        argument: name of the argument, for messages.
        value: the path or URL.
        allowed: the other values that the argument accepts, for messages.

    Raises:
        ArgumentError: there is no such file, or ``value`` is not a path or a supported URL.
        UnavailableError: the server refuses or does not answer.
        UserError: as for :func:`local_copy`.
    """
    if not is_url(value):
        return check_file(argument, value, allowed)
    check_url(argument, value)
    return local_copy(Url(value))


def _stored(cache: Cache, file: RemoteFile) -> Path:
    if file.size is not None and file.size > cache.limit:
        raise UserError(
            f"{file.url}: has {file.size / 1e9:.3g} GB, more than the cache may have; raise {LIMIT_VARIABLE}"
        )
    return cache.store(file.url.text, file.version, download(file))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # another process has removed it
        return None


@functools.cache
def _warn_of_cache(folder: Path, reason: str) -> None:
    """Say once per process that nothing can be cached."""
    _log.warning(
        "the cache %s cannot be written (%s), so remote files are read anew each time; set %s to another folder",
        *(folder, reason, FOLDER_VARIABLE),
    )

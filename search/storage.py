"""Where studies lie: a folder of this machine, or any URL that `pyarrow.fs` knows, such as `s3://bucket/studies`.

A local place is a `pathlib.Path`. A remote one is a `RemotePath`, which answers to the few methods of a Path that
studies need, so that nobody above has to ask which of the two it is. Credentials come from the environment.
"""

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from vae.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa

CREDENTIALS = ("AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_", "HADOOP_", "ARROW_", "SSL_CERT_")
"""Beginnings of the names of variables that pyarrow's filesystems read."""

BUILDING, REPLACED = ".tmp", ".old"
"""Endings of what stands beside a local tree while it is being replaced."""


class StorageFailed(OSError):
    """The storage could not be written, and retrying did not help. The text says where, why and what would do."""

    def __init__(self, place: object, reason: str) -> None:
        super().__init__(
            f"{place}: cannot be written: {reason}\n"
            f"what was written stays readable; when there is room again, the same command goes on"
        )


@contextlib.contextmanager
def failing_clearly(place: object) -> Iterator[None]:
    """Errors of the storage in this block tell where they happened and what would do."""
    try:
        yield
    except StorageFailed:
        raise
    except OSError as error:
        raise StorageFailed(place, reason_of(error)) from error


class RemotePath:
    """A file or folder behind a URL. A folder is there as soon as something is in it."""

    def __init__(self, filesystem: Any, path: str, url: str, query: str) -> None:
        self._filesystem, self._path, self._url, self._query = filesystem, path.rstrip("/"), url.rstrip("/"), query

    def __str__(self) -> str:
        return f"{self._url}?{self._query}" if self._query else self._url

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return location, (str(self),)  # another process takes its own credentials from its own environment

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self._filesystem, f"{self._path}/{name}", f"{self._url}/{name}", self._query)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        path, url = self._path.rpartition("/")[0], self._url.rpartition("/")[0]
        return RemotePath(self._filesystem, path, url, self._query)

    def exists(self) -> bool:
        return self._type() != "NotFound"

    def is_file(self) -> bool:
        return self._type() == "File"

    def is_dir(self) -> bool:
        return self._type() == "Directory"

    def read_bytes(self) -> bytes:
        with self._filesystem.open_input_stream(self._path) as stream:
            return stream.read()

    def read_buffer(self) -> "pa.Buffer":
        with self._filesystem.open_input_stream(self._path) as stream:
            return stream.read_buffer()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: "bytes | pa.Buffer") -> None:
        """Readers see the old object or the new one, whole."""
        with self._filesystem.open_output_stream(self._path) as stream:
            stream.write(content)

    def rename(self, target: "RemotePath") -> "RemotePath":
        self._filesystem.move(self._path, target._path)
        return target

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._filesystem.delete_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to be done."""

    def iterdir(self) -> Iterator["RemotePath"]:
        from pyarrow.fs import FileSelector

        for info in self._filesystem.get_file_info(FileSelector(self._path, allow_not_found=True)):
            yield self / info.base_name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What fits a pattern of `*` within names, level by level."""
        first, _, rest = pattern.partition("/")
        if "*" in first:
            found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
        else:
            found = [self / first]
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif "*" in first or path.exists():
                yield path

    def remove_tree(self) -> None:
        for _ in range(2):  # S3 has no folders: what may remain of one is the empty object that stands for it
            if self.is_dir():
                self._filesystem.delete_dir(self._path)

    def _type(self) -> str:
        return str(self._filesystem.get_file_info(self._path).type.name)


Location = Path | RemotePath


def location(place: "str | Location") -> Location:
    """The place that a path or URL names. Raises InputError for a URL that cannot be used."""
    text = str(place)
    if "://" not in text:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.scheme == "file":
        return Path(parts.path)
    if "@" in parts.netloc or {"access_key", "secret_key"} & dict(parse_qsl(parts.query)).keys():
        raise InputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: keys do not belong in a URL, which is "
            "shown and stored; put them in the environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    from pyarrow import fs

    options = dict(parse_qsl(parts.query))
    if parts.scheme == "s3":
        options = {"allow_delayed_open": "true"} | options  # one request for a small file instead of three
    try:
        # the URL without what stands for one file in it, so that its query may be given to any file below
        filesystem, path = fs.FileSystem.from_uri(parts._replace(query=urlencode(options)).geturl())
    except (OSError, ValueError) as error:
        raise InputError(f"{text}: cannot be opened: {reason_of(error)}") from None
    return RemotePath(filesystem, path, parts._replace(query="").geturl(), parts.query)


def credentials(storage: Location) -> dict[str, str]:
    """The variables of this process by which remote storage is reached; others may not have inherited them."""
    if isinstance(storage, Path):
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(CREDENTIALS)}


def read_buffer(path: Location) -> "pa.Buffer":
    """The content of a file in Arrow's own memory: memory of Python's is freed by a thread of Arrow's that needs
    Python for it, and where the process is about to end, that is an abort (pyarrow 26)."""
    import pyarrow as pa

    if isinstance(path, RemotePath):
        return path.read_buffer()
    with pa.OSFile(str(path)) as file:
        return file.read_buffer()


def write_atomically(path: Location, content: "bytes | pa.Buffer") -> None:
    """Put a file in place whole: written beside it, synced, renamed, and the rename synced. Objects always are."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, the room it took
        raise
    sync(path.parent)


def temporary_of(path: Path) -> Path:
    """What `write_atomically` writes first. Readers of the whole folder pass over a leading dot."""
    return path.with_name(f".{path.name}.tmp")


def sync(path: Path) -> None:
    """Return once a file's content, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(storage: Location) -> None:
    """Raises InputError if the storage could not be made or written. Leaves nothing there."""
    try:
        if isinstance(storage, RemotePath):
            was_there, probe = storage.exists(), storage / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
            if not was_there:
                storage.remove_tree()  # the empty object that stands for the folder
            return
        folder = storage.absolute()
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{storage}: cannot be written: {reason_of(error)}; name another with --storage") from None


def free_bytes(storage: Location) -> int | None:
    """What is left of the disk; None where nobody can tell."""
    if isinstance(storage, RemotePath):
        return None
    folder = storage.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def replace_tree(source: Path, target: Location, last: str) -> None:
    """Put a copy of a local folder of folders in place of what is there. A folder counts once its file `last` is there.

    On a disk the whole is exchanged at once, and synced; on remote storage it is a folder at a time.
    """
    if isinstance(target, RemotePath):
        for file in sorted(source.rglob("*"), key=lambda file: file.name == last):
            if file.is_file():
                (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
        for folder in list(target.iterdir()):
            if not (source / folder.name).exists():
                (folder / last).unlink(missing_ok=True)
                folder.remove_tree()
        return
    building, old = target.with_name(f"{target.name}{BUILDING}"), target.with_name(f"{target.name}{REPLACED}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        shutil.copytree(source, building)
        for path in (*building.rglob("*"), building):
            sync(path)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    if any(building.iterdir()):
        building.rename(target)
    else:
        building.rmdir()
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_tree(target: Location) -> None:
    """Undo a `replace_tree` that was cut off between its two renames."""
    if isinstance(target, Path) and (old := target.with_name(f"{target.name}{REPLACED}")).exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def fetch_tree(source: Location, target: Path) -> Path:
    """The local copy of a folder of files; a local folder is its own."""
    if isinstance(source, Path):
        return source
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def reason_of(error: BaseException) -> str:
    """What an error of the storage says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__

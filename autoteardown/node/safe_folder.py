"""Reads and writes files in a folder that other users may have tampered with, without following their links.

1. The default folder lies in a folder that every user can write to. So the file found at a name may belong to another
   user: a link to one of this user's folders, a folder of the other user, or a FIFO that never answers. Everything is
   checked on a descriptor after opening, and done relative to that descriptor.
2. No locks, and no file is written in place: a teardown's thread may run these functions while the main thread is held
   inside one of them.
3. All functions raise OSError, and nothing else.
"""

from __future__ import annotations

import os
import stat

LIMIT = 65536


def absolute(path: str) -> str:
    """The absolute path, without a trailing slash: with one, the kernel follows a link in the last component."""
    return os.path.abspath(path)


def open_own(path: str, create: bool = False) -> int:
    """Open a folder that belongs to this user and that no other user can write to.

    Args:
        path: absolute.
        create: make the folder, with mode 0700, if it does not exist.

    Returns:
        The folder's descriptor.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
    try:
        folder = os.open(path, flags)
    except NotADirectoryError:  # O_NOFOLLOW with O_DIRECTORY raises this for a link, too
        raise NotADirectoryError("it is a link, or no folder") from None
    about = os.fstat(folder)
    if about.st_uid != os.geteuid():
        os.close(folder)
        raise PermissionError(f"it belongs to uid {about.st_uid}, not to {os.geteuid()}")
    if about.st_mode & 0o022:
        os.close(folder)
        mode = stat.S_IMODE(about.st_mode)
        raise PermissionError(
            f"others can write to it (mode {mode:04o}); in a shared volume, name a subfolder"
        )
    return folder


def open_any(path: str) -> int:
    """Open a folder that other users may write to, for `create` and `replace`, which follow no links in it.

    Works also where this user may write to the folder but not list it.
    """
    return os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)


def replace(folder: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a file atomically: a reader finds the old content or the new, never a part."""
    temporary = _write_beside(folder, name, data, mode)
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        remove(folder, temporary)
        raise


def create(folder: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a new file atomically.

    Raises:
        FileExistsError: the name exists already.
    """
    temporary = _write_beside(folder, name, data, mode)
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except (
        OSError
    ):  # object stores and FAT have no links: reserve the name first, then rename the content to it
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(name, flags, mode, dir_fd=folder))
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        remove(folder, temporary)


def _write_beside(folder: int, name: str, data: bytes, mode: int) -> str:
    temporary = f".{name}.{os.urandom(8).hex()}"  # a name that no other user can have guessed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, mode, dir_fd=folder)
    except FileExistsError:  # the temporary name exists; callers take FileExistsError for the name itself
        raise OSError("a temporary file of that name exists") from None
    try:
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError("the disk is full")
    except BaseException:
        remove(folder, temporary)
        raise
    return temporary


def read(folder: int, name: str) -> bytes:
    """The first `LIMIT` bytes of a regular file that belongs to this user."""
    # O_NONBLOCK: opening a FIFO would block until a writer comes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise OSError("not a regular file of this user")
        return os.read(descriptor, LIMIT)
    finally:
        os.close(descriptor)


def remove(folder: int, name: str) -> None:
    """Remove a file if it exists and can be removed."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        pass

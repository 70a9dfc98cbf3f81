"""Folders used without following what others may have put there; and one that only this user can write.

The default one lies in a folder that everybody can write, so whatever is found under its name may be somebody
else's: a link to a folder of ours, a folder of theirs, a FIFO that never answers. Everything is checked on a
descriptor, after opening, and done relative to it.

No locks, and nothing is written in place: a teardown's thread may be here while the main thread is held here
too. All functions raise OSError, and nothing else.
"""

from __future__ import annotations

import os
import stat

LIMIT = 65536


def absolute(path: str) -> str:
    """Without the trailing slash, too: with one, the kernel follows a link in the last component."""
    return os.path.abspath(path)


def open_own(path: str, create: bool = False) -> int:
    """The descriptor of an absolute path's folder, if nobody else can write to it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
    try:
        folder = os.open(path, flags)
    except NotADirectoryError:  # what O_NOFOLLOW with O_DIRECTORY makes of a link
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
    """The descriptor of a folder that others may write to: for `create` and `replace`, which follow nothing there.

    Enough where all may write and nobody may list.
    """
    return os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)


def replace(folder: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    temporary = _write_beside(folder, name, data, mode)
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        remove(folder, temporary)
        raise


def create(folder: int, name: str, data: bytes, mode: int = 0o600) -> None:
    """Write a new file so that a reader finds all of it; FileExistsError where anything has that name already."""
    temporary = _write_beside(folder, name, data, mode)
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # object stores and FAT have no links: take the name first, then put the content under it
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(name, flags, mode, dir_fd=folder))
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        remove(folder, temporary)


def _write_beside(folder: int, name: str, data: bytes, mode: int) -> str:
    temporary = f".{name}.{os.urandom(8).hex()}"  # a name that nobody can have put something under
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, mode, dir_fd=folder)
    except FileExistsError:  # of its temporary name: no word on the name itself
        raise OSError("somebody is in the way") from None
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
    """A file's content, as far as `LIMIT`, if it is a plain file of this user."""
    # O_NONBLOCK: a FIFO would hold us until somebody writes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise OSError("not a file of ours")
        return os.read(descriptor, LIMIT)
    finally:
        os.close(descriptor)


def remove(folder: int, name: str) -> None:
    """Remove a file, if it is there and can be removed."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        pass

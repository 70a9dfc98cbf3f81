"""PID namespaces: containers without an engine."""

import functools
import subprocess

import pytest

_WORDS = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")


@functools.cache
def _allowed():
    for words in (_WORDS, (_WORDS[0], "--user", "--map-root-user", *_WORDS[1:])):
        try:
            if subprocess.run([*words, "true"], capture_output=True, timeout=20).returncode == 0:
                return words
        except OSError:
            break
    return None


def in_pid_namespace():
    """The words before a command that make it process 1 of a namespace of its own; skips where that is forbidden."""
    words = _allowed()
    if words is None:
        pytest.skip("this user may not make a PID namespace (unshare)")
    return words

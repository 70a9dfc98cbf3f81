"""A stream's acknowledgements."""

from harness import wait_until

from autoteardown.event_loop import sockets


def connected():
    listener = sockets.listen("127.0.0.1")
    near = sockets.connect(*listener.getsockname())
    far = wait_until(lambda: accept(listener), "the connection")
    listener.close()
    sockets.set_options(near)
    return sockets.Stream(near), sockets.Stream(far)


def accept(listener):
    try:
        fd, _ = listener._accept()
    except BlockingIOError:
        return None
    return sockets.accepted(fd)


def received(stream):
    return wait_until(stream.receive, "data")


def test_data_is_acknowledged_at_once():
    """A rank 0 that exits waits until its messages are: the kernels of its peers would take 40 ms."""
    rank, hub = connected()
    try:
        for _ in range(20):  # as a conversation, the connection gets to where the kernel waits for an answer
            rank.send(b"post")
            received(hub)
            hub.send(b"message")
            received(rank)
        rank.acknowledge()
        assert sockets.unacknowledged(hub.fd) == 0
    finally:
        rank.close()
        hub.close()

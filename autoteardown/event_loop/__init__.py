"""The agent's event loop: one thread in each armed rank, with the non-blocking sockets that it serves."""

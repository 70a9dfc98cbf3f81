"""The one thread of an armed rank, and the non-blocking sockets that it serves."""

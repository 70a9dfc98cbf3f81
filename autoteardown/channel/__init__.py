"""The connections between the ranks of one process group: a hub on rank 0, and a client on every other rank."""

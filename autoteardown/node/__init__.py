"""The node's registry of armed ranks, draining them, and reading processes from /proc."""

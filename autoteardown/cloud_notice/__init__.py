"""Watches for the cloud's announcement that this machine ends, and drains its ranks with the time that is left."""

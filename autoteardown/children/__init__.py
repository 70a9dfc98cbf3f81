"""Lets the child processes of a rank outlive an eviction signal that everybody gets, until their rank has left."""

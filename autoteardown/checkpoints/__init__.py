"""Checkpoints: which saves are in progress, which processes write them, and callbacks that save at an eviction."""

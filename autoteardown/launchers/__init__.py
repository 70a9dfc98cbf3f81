"""Processes that start ranks: how the agent changes what they do when the platform evicts them."""

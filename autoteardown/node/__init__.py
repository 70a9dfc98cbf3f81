"""The armed ranks of this node: their registry, and how they are drained."""

"""The training thread: which one it is, where its iterations end, and where it stops."""

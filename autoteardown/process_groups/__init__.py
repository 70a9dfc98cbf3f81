"""Process groups and devices: drain, destroy and abort for every torch version and backend."""

"""What frameworks do that a stop has to know of: one small module each."""

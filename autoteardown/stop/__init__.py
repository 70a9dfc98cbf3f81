"""One stop of a rank, from the eviction signal to the exit: protocol, coordinator, driver, deadline, reports."""

"""Arrays in, arrays out: the operations of the networks, and the lowerings that make them fast."""

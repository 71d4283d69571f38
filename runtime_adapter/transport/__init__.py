"""Messages between servers: rendezvous, store, connections, the wire format, the send queue."""

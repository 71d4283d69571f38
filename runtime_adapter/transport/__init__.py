"""Messages between servers: rendezvous, connections, the bytes on the wire, the send queue."""

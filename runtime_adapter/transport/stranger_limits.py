"""What a process that listens gives to those who have not shown that they know the secret.

They hold for the ports of workers and for the store's alike.
"""

#: A handshake must be done within so long.
HANDSHAKE_TIMEOUT_S = 5.0
#: Connections without a handshake at a time.
MAX_UNAUTHENTICATED = 32
#: Failed handshakes a second, after which accepting pauses.
MAX_FAILURES_PER_S = 100
#: Refused connections are reported at most so often.
REPORT_INTERVAL_S = 60.0

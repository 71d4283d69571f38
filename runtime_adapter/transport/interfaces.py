"""Whether links can use a network interface: asked before a server joins a run."""

from __future__ import annotations

import socket
import struct

from prism_plan.errors import InputError, did_you_mean

#: Of Linux: ask for an interface's flags, for its IPv4 address; the flag that it is up.
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 0x1


def require_interface(name: str, *, ipv4: bool = True) -> None:
    """Refuse a network interface that is not there, is down, or has no address.

    ``ipv4`` is False where the store's address is one of IPv6: then any address will do.

    Raises
    ------
    InputError
        Names the interfaces that there are.
    """
    names = [known for _, known in socket.if_nameindex()]

    def refuse(found: str, remedy: str) -> InputError:
        return InputError(
            found, parameter="interface", expected=f"one of {', '.join(names)}", remedy=remedy
        )

    if name not in names:
        near = did_you_mean(name, names)
        raise refuse(f"no interface {name!r:.60}{near}", "see ip address")
    flags = _ask(name, _SIOCGIFFLAGS)
    if flags is not None and not struct.unpack_from("=H", flags, 16)[0] & _IFF_UP:
        raise refuse(f"{name!r} is down", f"ip link set {name} up, or choose another one")
    if ipv4 and flags is not None and _ask(name, _SIOCGIFADDR) is None:
        raise refuse(
            f"{name!r} has no IPv4 address", "give it one that the other servers reach, or choose "
            "another one",
        )  # fmt: skip


def _ask(name: str, what: int) -> bytes | None:
    """What the system says of an interface; None where it has no answer."""
    try:
        import fcntl
    except ImportError:  # not a Unix: gloo will say what is wrong
        return None
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            return fcntl.ioctl(asking.fileno(), what, request)
        except OSError:
            return None

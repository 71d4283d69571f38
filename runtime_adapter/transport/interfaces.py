"""Checks, before a server joins a run, that its connections can use a network interface."""

from __future__ import annotations

import ipaddress
import socket
import struct

from prism_plan.errors import InputError, did_you_mean

#: Linux requests for an interface's flags and its IPv4 address; the flag of one that is up.
_SIOCGIFFLAGS, _SIOCGIFADDR, _IFF_UP = 0x8913, 0x8915, 0x1


def require_interface(name: str, *, ipv4: bool = True) -> None:
    """Refuse a network interface that does not exist, is down, or has no address.

    ``ipv4`` is False where the store has an IPv6 address: then the interface needs no IPv4 one.

    Raises
    ------
    InputError
        Names the interfaces of this machine.
    """
    names = [known for _, known in socket.if_nameindex()]

    def refuse(found: str, remedy: str) -> InputError:
        return InputError(
            found, parameter="interface", expected=f"one of {', '.join(names)}", remedy=remedy
        )

    if name not in names:
        suggestion = did_you_mean(name, names)
        raise refuse(f"no interface {name!r:.60}{suggestion}", "see ip address")
    flags = _request(name, _SIOCGIFFLAGS)
    if flags is not None and not struct.unpack_from("=H", flags, 16)[0] & _IFF_UP:
        raise refuse(f"{name!r} is down", f"ip link set {name} up, or choose another one")
    if ipv4 and flags is not None and _request(name, _SIOCGIFADDR) is None:
        raise refuse(
            f"{name!r} has no IPv4 address", "give it one that the other servers reach, or choose "
            "another one",
        )  # fmt: skip


def _request(name: str, code: int) -> bytes | None:
    """Query the kernel about an interface; None where it has no answer."""
    try:
        import fcntl
    except ImportError:  # not a Unix: gloo reports what is wrong
        return None
    argument = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            return fcntl.ioctl(any_socket.fileno(), code, argument)
        except OSError:
            return None


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this machine.

    Raises
    ------
    InputError
        It has none; names the interfaces of this machine.
    """
    require_interface(interface)
    answer = _request(interface, _SIOCGIFADDR)
    if answer is None:
        raise InputError(f"{interface!r:.60} has no address", parameter="interface")
    return socket.inet_ntoa(answer[20:24])


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is only reached from this machine itself."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)

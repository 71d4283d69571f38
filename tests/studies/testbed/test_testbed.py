"""The testbed: namespaces and shaped lines that work, count, and are gone afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_plan.errors import InputError
from studies.testbed import command as testbed_command
from studies.testbed import namespaces as netns
from studies.testbed.shaping import TokenBucket
from studies.testbed.testbed import Testbed, TestbedUnavailable
from tests.limits import HANG_S

ROOT = Path(__file__).resolve().parents[3]
MBPS = 200.0
PAYLOAD = 4_000_000
#: Payload in a full frame and what surrounds it: Ethernet, IPv4, TCP with time stamps.
SEGMENT, HEADERS = 1448, 66

SINK = """
import os, socket, threading
def serve(peer):
    while peer.recv(1 << 20): pass
    peer.sendall(b"k")
    peer.close()
listener = socket.create_server((os.environ["PRISM_ADDRESS"], 5000))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

#: Sends so many bytes to each address at once; prints when it began and when all had arrived.
SOURCE = """
import socket, sys, threading, time
def connect(address):
    for _ in range(200):
        try: return socket.create_connection((address, 5000))
        except OSError: time.sleep(0.05)
def send(peer):
    peer.sendall(bytes(int(sys.argv[1])))
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) + peer.recv(1) == b"k"  # and then nothing: the other end has closed
peers = [connect(address) for address in sys.argv[2:]]
began = time.monotonic()
threads = [threading.Thread(target=send, args=(peer,)) for peer in peers]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(began, time.monotonic())
"""


def python(code: str, *words: object) -> list[str]:
    """A command that runs a small script without the site's packages, which start slowly."""
    return [sys.executable, "-I", "-S", "-c", code, *map(str, words)]


@pytest.fixture(scope="module")
def possible() -> None:
    """Skip where the machine or the user cannot make a testbed."""
    try:
        Testbed(1).close()
    except TestbedUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bed(possible: None) -> Iterator[Testbed]:
    """Three servers; the first and the second take what they are sent."""
    with Testbed(3, MBPS) as testbed:
        for index in (0, 1):
            testbed.run(index, python(SINK))
        yield testbed


def transfers(bed: Testbed, plan: dict[int, list[int]], payload: int = PAYLOAD) -> float:
    """Bytes a second, all transfers together, when each server of the plan sends to its targets."""
    sources = [
        bed.run(
            index,
            python(SOURCE, payload, *(bed.address(target) for target in targets)),
            stdout=subprocess.PIPE,
        )
        for index, targets in plan.items()
    ]
    spans = [tuple(map(float, source.communicate(timeout=HANG_S)[0].split())) for source in sources]
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return payload * sum(map(len, plan.values())) / seconds


def reaches(bed: Testbed, plan: dict[int, list[int]], least: float, most: float) -> bool:
    """Whether transfers reach ``least`` of a line's rate, in any of some attempts, never ``most``.

    A machine that does other work may slow down any one attempt, but speeds up none.
    """
    for _ in range(20):
        rate = transfers(bed, plan) * 8e-6 / MBPS
        assert rate <= most
        if rate >= least:
            return True
    return False


def left_of(pid: int) -> list[str]:
    """Names in the namespace list and the link list that tell of a testbed of this process."""
    words = subprocess.run(
        "ip netns list; ip -o link", shell=True, capture_output=True, text=True, check=True
    ).stdout.split()
    return [word for word in words if f"prism-{pid}-" in word or word.startswith("prism0")]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command(*words: str) -> list[str]:
    """The testbed's command line."""
    return [sys.executable, "-m", "studies.testbed", *words]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, and check that nothing is left of it."""
    process = subprocess.Popen(
        command(*words), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate(timeout=HANG_S)
    assert left_of(process.pid) == []
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def begin(script: str, *options: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start the command with two servers, and give the ids they print once they are up."""
    words = command("--servers", "2", *options, "--", "sh", "-c", f"{script}")
    process = subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(process.stdout.readline().rpartition(" ")[2]) for _ in range(2)]
    assert all(map(alive, pids))
    assert len(left_of(process.pid)) >= 3
    return process, pids


def test_servers_reach_each_other_by_name_and_number(bed: Testbed) -> None:
    """A server is told its place, and a connection to any other one's address succeeds."""
    code = "import os, sys; print(*sys.argv[1:], *(os.environ['PRISM_' + k] for k in "
    code += "('SERVER_INDEX','SERVER_NAME','SERVERS','NAMES','INTERFACE','ADDRESS','ADDRESSES')))"
    process = bed.run(2, python(code, "{index}-{name}-{address}-{other}"), stdout=subprocess.PIPE)
    told = process.communicate(timeout=HANG_S)[0].decode().split()
    own, addresses = bed.address(2), ",".join(bed.addresses)
    names = "server-0,server-1,server-2"
    assert told[0] == f"2-server-2-{own}-{{other}}"
    assert told[1:] == ["2", "server-2", "3", names, "prism0", own, addresses]
    assert transfers(bed, {2: [0], 0: [1], 1: [0]}, payload=1) > 0


def test_a_transfer_takes_the_line_rate(bed: Testbed) -> None:
    """4 MB arrive no faster than the line allows, and not much slower, in either direction."""
    for plan in ({0: [1]}, {1: [0]}):
        assert reaches(bed, plan, 0.5, 1.1)


def test_uplink_and_downlink_are_shaped_each(bed: Testbed) -> None:
    """Two receivers share a sender's uplink, two senders a receiver's downlink."""
    for plan in ({2: [0, 1]}, {1: [0], 2: [0]}):
        assert transfers(bed, plan) * 8e-6 / MBPS <= 1.1


def test_directions_do_not_share_a_line(bed: Testbed) -> None:
    """Both ways at once, twice the rate of a line passes: lines are full duplex."""
    assert reaches(bed, {0: [1], 1: [0]}, 1.1, 2.2)


def test_both_ends_have_the_bucket(bed: Testbed) -> None:
    """The kernel reports a token bucket of the asked rate and depth at both ends of each pair."""
    ends = [(bed._switch, f"port{n}") for n in range(3)]
    ends += [(namespace, bed.interface) for namespace in bed._namespaces]
    for namespace, interface in ends:
        text = netns.query("tc", namespace, "-j", "qdisc", "show", "dev", interface)
        (qdisc,) = json.loads(text)
        assert qdisc["kind"] == "tbf"
        assert qdisc["options"]["rate"] == MBPS * 1e6 / 8
        assert qdisc["options"]["burst"] == pytest.approx(64_000, rel=0.01)


#: Says "ready", then waits for as many bytes from the first server as it is told, and says so.
RECEIVE = """
import os, socket, sys
listener = socket.create_server((os.environ["PRISM_ADDRESS"], 5001))
print("ready", flush=True)
peer = listener.accept()[0]
for _ in range(3):
    print(peer.recv(1).decode(), flush=True)
"""
#: Sends a byte for each line of its input.
SEND = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 5001))
for line in sys.stdin:
    peer.sendall(line[:1].encode())
"""


def test_a_cable_is_taken_out_and_put_back(bed: Testbed) -> None:
    """What is sent while a server's cable is out has not arrived by then, and does afterwards."""
    receiver = bed.run(1, python(RECEIVE), stdout=subprocess.PIPE)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == b"ready\n"
    sender = bed.run(2, python(SEND, bed.address(1)), stdin=subprocess.PIPE)
    assert sender.stdin is not None
    sender.stdin.write(b"a\n")
    sender.stdin.flush()
    assert receiver.stdout.readline() == b"a\n"
    before = bed.line(1)
    bed.cut(1)
    carrier = netns.query("ip", bed._namespaces[1], "link", "show", "dev", bed.interface)
    assert "NO-CARRIER" in carrier
    sender.stdin.write(b"b\n")
    sender.stdin.flush()
    assert (bed.line(1) - before).received_packets == 0
    bed.mend(1)
    assert receiver.stdout.readline() == b"b\n"
    sender.communicate(b"c\n", timeout=HANG_S)
    assert receiver.communicate(timeout=HANG_S)[0] == b"c\n"
    assert (receiver.returncode, sender.returncode) == (0, 0)


def test_a_link_is_slowed_down(bed: Testbed) -> None:
    """A transfer takes no less than the lower rate allows; the link is as before afterwards."""
    bed.slow_down(1, 50)
    assert transfers(bed, {0: [1]}, payload=400_000) * 8e-6 / MBPS <= 1.5 / 50
    bed.slow_down(1, 1)
    test_both_ends_have_the_bucket(bed)


def test_counters_count_the_transfer_and_nothing_else(bed: Testbed) -> None:
    """Payload plus headers at both ends, frame by frame; a third server sees not one packet."""
    transfers(bed, {0: [1]}, payload=1)  # connections of earlier tests have ended
    before = [(bed.counters(n), bed.line(n)) for n in range(3)]
    transfers(bed, {0: [1]}, payload=1_000_000)
    after = [(bed.counters(n), bed.line(n)) for n in range(3)]
    interface, line = zip(
        *((b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)), strict=True
    )
    frames = line[0].sent_packets
    assert 1_000_000 / SEGMENT <= frames <= 1.1 * 1_000_000 / SEGMENT
    # the first frame has more options; on a busy machine one may be sent twice
    assert line[0].sent_bytes == pytest.approx(1_000_000 + HEADERS * frames, abs=5_000)
    assert line[0].sent_bytes == line[1].received_bytes
    assert line[1].sent_bytes == line[0].received_bytes
    packets = interface[0].sent_packets
    assert packets < frames
    assert interface[0].sent_bytes == pytest.approx(1_000_000 + HEADERS * packets, abs=5_000)
    assert interface[0].received_packets > 0
    for traffic in (interface[2], line[2]):
        assert set(vars(traffic).values()) == {0}
    assert line[0].dropped_packets == line[1].dropped_packets == 0


def test_only_addresses_of_the_testbed_exist_inside(bed: Testbed) -> None:
    """A server has loopback and its own address, no IPv6 on the line, and no way out."""
    links = json.loads(netns.query("ip", bed._namespaces[0], "-j", "address"))
    own = {link["ifname"]: [info["local"] for info in link["addr_info"]] for link in links}
    assert own["prism0"] == [bed.address(0)]
    routes = json.loads(netns.query("ip", bed._namespaces[0], "-j", "route"))
    assert [route["dst"] for route in routes] == [str(bed.network)]
    host = subprocess.run(["ip", "-j", "address"], capture_output=True, check=True, text=True)
    assert bed.address(0).rpartition(".")[0] + "." not in host.stdout


@pytest.mark.usefixtures("possible")
def test_removed_after_an_exception() -> None:
    """An error inside the with block removes namespaces and kills what runs, children too."""
    before = set(left_of(os.getpid()))
    with pytest.raises(ZeroDivisionError), Testbed(2) as testbed:
        script = "sleep 60 & echo $!; wait"
        process = testbed.run(0, ["sh", "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as out:
            child = int(out.readline())
        assert alive(child)
        _ = 1 / 0
    assert process.returncode == -signal.SIGKILL
    assert not alive(child)
    assert set(left_of(os.getpid())) == before
    testbed.close()  # once more is no error


@pytest.mark.usefixtures("possible")
def test_removed_when_it_cannot_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step of the making fails, what was made before is removed, and the step is named."""
    before = set(left_of(os.getpid()))
    monkeypatch.setattr(
        TokenBucket, "qdisc", lambda self, interface: f"qdisc add dev {interface} root x"
    )
    with pytest.raises(TestbedUnavailable, match=r"tc qdisc add dev prism0 root x: .*unknown"):
        Testbed(2)
    assert set(left_of(os.getpid())) == before


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_servers_and_removes_all(signum: signal.Signals) -> None:
    """Servers may end in their own way; nothing is left, and the exit code tells the signal."""
    script = f"trap 'echo bye; exit 0' {signum.value}; echo $$; sleep 60 & wait"
    process, pids = begin(script)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=HANG_S)
    assert sorted(out.splitlines()) == ["server-0: bye", "server-1: bye"]
    assert process.returncode == 128 + signum
    assert not any(map(alive, pids))
    assert left_of(process.pid) == []


@pytest.mark.usefixtures("possible")
def test_servers_that_hear_nothing_are_killed() -> None:
    """Servers that ignore signals would have an hour to end; asked again, they go at once."""
    script = "trap 'echo int' INT; trap 'echo term' TERM; echo $$; while :; do sleep 0.1; done"
    process, pids = begin(script, "--grace-s", "3600")
    assert process.stdout is not None
    for heard in ("int", "term"):  # asks, stops waiting for it
        process.send_signal(signal.SIGINT)
        lines = sorted(process.stdout.readline() for _ in pids)
        assert lines == [f"server-0: {heard}\n", f"server-1: {heard}\n"]
    process.send_signal(signal.SIGINT)  # stops waiting for SIGTERM
    process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert not any(map(alive, pids))
    assert left_of(process.pid) == []


@pytest.mark.usefixtures("possible")
def test_leftovers_of_a_killed_testbed_go_at_the_next_start() -> None:
    """SIGKILL leaves namespaces and servers behind; the next testbed removes them first."""
    process, pids = begin("echo $$; sleep 60")
    process.kill()
    process.communicate(timeout=HANG_S)
    with Testbed(1):  # or one that someone else has just started
        assert left_of(process.pid) == []
        assert not any(map(alive, pids))


def test_leftovers_are_told_from_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left over is a namespace of ours whose process is gone, or whose number another one has."""
    own, gone = netns.names_for(["s0"])[0], "prism-999999999-5-0-switch"
    reused = f"prism-{os.getpid()}-1-0-s1"
    for name in (own, gone, reused, "other", "prism-x-1-0-s0", f"{gone}.old"):
        (tmp_path / name).touch()
    monkeypatch.setattr(netns, "NETNS_FOLDER", tmp_path)
    assert set(netns.orphaned()) == {gone, reused}
    monkeypatch.setattr(netns, "NETNS_FOLDER", tmp_path / "missing")
    assert netns.orphaned() == []


def test_two_testbeds_at_once(bed: Testbed) -> None:
    """A second testbed takes the same addresses and disturbs nothing, then or when it goes."""
    with Testbed(2, MBPS) as other:
        other.run(1, python(SINK))
        before = bed.counters(1)
        assert transfers(other, {0: [1]}, payload=1000) > 0
        assert set(vars(bed.counters(1) - before).values()) == {0}
    assert transfers(bed, {0: [1]}, payload=1000) > 0


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("exit 0", 0, ""),
        ("[ {index} = 0 ] || exit 7; sleep 60", 7, "testbed: b ended with exit code 7\n"),
        ("[ {index} = 0 ] || kill -9 $$; sleep 60", 137, "testbed: b ended with signal 9\n"),
    ],
)
def test_exit_code_of_the_first_that_fails(script: str, code: int, message: str) -> None:
    """All well is 0; else the failing server is named, its code given, and the other one ended."""
    options = ["--names", "a,b", "--grace-s", "0.1", "--mbps", "50"]
    result = call(*options, "--", "sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", message)


@pytest.mark.usefixtures("possible")
def test_others_have_a_grace_period(tmp_path: Path) -> None:
    """After a failure the others may go on for a while, say what they saw, and end."""
    script = "[ {name} = a ] && exit 3; sleep 0.5; echo out $PRISM_RTT_MS; echo err >&2; printf x"
    words = ["--names", "a,b", "--rtt-ms", "1.5"]
    result = call(*words, "--", "sh", "-c", script)
    assert result.returncode == 3
    assert result.stdout == "b: out 1.5\nb: x\n"
    assert result.stderr == "testbed: a ended with exit code 3\nb: err\n"
    logs = tmp_path / "new" / "logs"
    result = call(*words, "--logs", str(logs), "--", "sh", "-c", script)
    assert result.stdout == ""
    files = {path.name: path.read_text() for path in logs.iterdir()}
    assert files == {"a.out": "", "a.err": "", "b.out": "out 1.5\nx", "b.err": "err\n"}


@pytest.mark.usefixtures("possible")
def test_a_reader_that_goes_away_ends_the_servers() -> None:
    """`testbed ... | head` ends, with the code that a closed pipe gives, and leaves nothing."""
    words = command("--servers", "2", "--", "sh", "-c", "while echo y; do sleep 0.01; done")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout as out:
        out.readline()
    with process.stderr as err:
        assert b"Traceback" not in err.read()
    assert process.wait(timeout=HANG_S) == 141
    assert left_of(process.pid) == []


def complaint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> str:
    """What the command says, without any testbed, and that it leaves with code 2."""
    monkeypatch.setattr(sys, "argv", ["testbed", *words])
    assert testbed_command.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_without_root_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is not root is told so."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in complaint(capsys, monkeypatch, "--", "/bin/sh")


def test_without_iproute2_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where iproute2 is not installed the message says what is missing."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = complaint(capsys, monkeypatch, "--", "/bin/sh")
    assert "no ip and no tc and no bridge; install iproute2" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mbps", "0", "--", "sh"], "--mbps: 0; expected 0.1 to 100000"),
        (["--mbps", "nan", "--", "sh"], "--mbps: nan; expected 0.1 to 100000"),
        (["--burst-kb", "1", "--", "sh"], "--burst-kb: 1; expected 2 to 100000"),
        (["--rtt-ms", "-1", "--", "sh"], "--rtt-ms: -1; expected 0 to 60000"),
        (["--servers", "0", "--", "sh"], "--servers: 0; expected 1 to 200"),
        (["--servers", "3", "--names", "a,b", "--", "sh"], "--names: 2 names for 3 servers"),
        (["--names", "a,a", "--", "sh"], "--names: the same name twice"),
        (["--names", "a/b", "--", "sh"], "--names: 'a/b'; expected letters"),
        (["--", "no-such-program"], "no such command: no-such-program"),
        (["--logs", "/dev/null/x", "--", "sh"], "--logs /dev/null/x: not a directory"),
        ([], "Missing argument"),
        (["--servers", "x", "--", "sh"], "'x' is not a valid integer"),
    ],
)
def test_bad_options_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    """Each wrong option is one line that names it, and exit code 2."""
    assert said in complaint(capsys, monkeypatch, *words)


def test_a_packet_fits_the_bucket_twice() -> None:
    """TCP's large packets take half a bucket, and no more than the kernel allows."""
    assert [TokenBucket(500, kb).largest_packet_bytes for kb in (2, 64, 1000)] == [
        1500,
        32_000,
        65_536,
    ]
    with pytest.raises(InputError, match="queue_kb: 1; expected 2"):
        TokenBucket(500, queue_kb=1)


GLOO = """
import os, sys
from datetime import timedelta
import torch, torch.distributed as dist
rank, wait = int(os.environ["PRISM_SERVER_INDEX"]), timedelta(seconds=60)
host = os.environ["PRISM_ADDRESSES"].split(",")[0]
store = dist.TCPStore(host, 29500, 2, rank == 0, wait)
options = dist.ProcessGroupGloo._Options()
options._timeout = wait
interface = os.environ["PRISM_INTERFACE"]
options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
group = dist.ProcessGroupGloo(dist.PrefixStore("pair", store), rank, 2, options)
tensor = torch.arange(1_000_000, dtype=torch.float32) * (1 - rank)
if rank == 0:
    group.send([tensor], 1, 0).wait()
    answer = torch.empty(1)
    group.recv([answer], 1, 1).wait()
    print(answer.item())
else:
    group.recv([tensor], 0, 0).wait()
    group.send([tensor[-1:].clone()], 0, 1).wait()
"""


@pytest.mark.usefixtures("possible")
def test_gloo_runs_over_the_line() -> None:
    """Two processes of torch.distributed meet at server 0's address and use the line."""
    pytest.importorskip("torch")
    with Testbed(2, 500) as testbed:
        code = [sys.executable, "-c", GLOO]
        ranks = [testbed.run(n, code, stdout=subprocess.PIPE) for n in range(2)]
        said = [rank.communicate(timeout=HANG_S)[0] for rank in ranks]
        assert said == [b"999999.0\n", b""]
        assert [rank.returncode for rank in ranks] == [0, 0]
        traffic = testbed.line(0)
    assert PAYLOAD < traffic.sent_bytes < 1.1 * PAYLOAD
    assert traffic.dropped_packets == 0


#: Ethernet, IP and TCP with time stamps, of every frame.
FRAME_BYTES = 14 + 20 + 32
#: Of every call and its answer: two headers, and four of gloo's own (ready to receive, and data).
CALL_BYTES = 2 * 32 + 4 * 48


@pytest.mark.usefixtures("possible")
def test_the_lines_carry_what_is_counted(tmp_path: Path) -> None:
    """A replay on shaped lines: payload as simulated to the byte, and the kernel counts as much.

    The lines' own counters agree within 5 % once headers of frames and messages are added.
    """
    pytest.importorskip("torch")
    import prism_plan as pp
    from studies.testbed.experiment import launch, read_measured
    from tests.runtime_adapter.replays import SPEC, Material, cluster_text, striped

    spec = dataclasses.replace(SPEC, hidden_size=4096)
    material = Material(tmp_path, cluster_text(slots=16), spec)
    placement = material.placement("p.json", striped(4, 0))
    names = placement.servers
    with Testbed(3, 500, names=names) as testbed:
        before = [testbed.line(n) for n in range(3)]
        options = ["--placement", "p.json", "--trace", "trace.parquet", "--cluster", "cluster.toml"]
        options = [str(tmp_path / word) if "." in word else word for word in options]
        out = ["-o", str(tmp_path / "{name}.jsonl"), "--stats", str(tmp_path / "{name}.stats.json")]
        launch(testbed, names, tmp_path, "replay", [*options, "--requests", "30", *out])
        lines = [testbed.line(n) - before[n] for n in range(3)]
    counted, _ = read_measured(names, tmp_path)
    requests = pp.sample_requests(material.trace, material.cluster, requests_per_server=30)
    report = pp.simulate_placements(
        [("p", placement)], requests, material.trace, material.cluster
    ).to_json()
    (run,) = report["runs"]
    assert counted["failed"] == counted["retries"] == 0
    assert counted["payload_bytes"] == run["bytes_sent"]
    assert counted["expert_calls"] == run["expert_calls"]
    assert counted["remote_calls"] == run["remote_calls"]
    sent = sum(line.sent_bytes for line in lines)
    frames = sum(line.sent_packets for line in lines)
    wanted = counted["payload_bytes"] + CALL_BYTES * counted["messages"] + FRAME_BYTES * frames
    assert sent == pytest.approx(wanted, rel=0.05)
    assert sum(line.dropped_packets for line in lines) == 0

"""Which processes a run has: flags, faked launchers, and how they meet. No device is touched."""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from jax._src.clusters import cloud_tpu_cluster

from mmx.cli import main
from recipes import processes as recipes_processes
from sharding import peers as meeting
from sharding.peers import meet
from sharding.processes import Cluster, Processes, detect

SLURM = {
    "SLURM_JOB_ID": "4099",  # port 61440 + 4099 % 4096
    "SLURM_STEP_NODELIST": "node[007-009],other2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",  # port 61440 + 2
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GKE = {
    "TPU_WORKER_HOSTNAMES": "localhost,tpu-1,tpu-2,tpu-3",
    "TPU_WORKER_ID": "2",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
}
PREFIXES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_")


@pytest.fixture
def environment(monkeypatch):
    """Pretend to have been started by a launcher."""

    def pretend(values, *, tpu=False):
        for name in list(os.environ):
            if name.startswith(PREFIXES):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)

    pretend({})
    return pretend


# ---------------------------------------------------------------- detection


def test_alone(environment):
    assert detect(Processes()) is None
    environment(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert detect(Processes()) is None
    environment(SLURM)
    assert detect(Processes(num_processes=1)) is None
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # a pod of no indexed job
    assert detect(Processes()) is None
    environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, tpu=True)
    assert detect(Processes()) is None


def test_by_hand(environment):
    environment(SLURM)  # is not asked
    asked = Processes(coordinator="[::1]:1234", process_id=1, num_processes=2)
    found = detect(asked)
    assert found == Cluster("by hand", "[::1]:1234", 1, 2, None)
    assert (found.host, found.port, found.on_loopback) == ("::1", 1234, True)
    assert found.describe() == "process 1 of 2 (by hand), coordinator [::1]:1234"
    for host, loopback in (
        ("localhost", True),
        ("127.0.0.9", True),
        ("10.0.0.1", False),
        ("n1", False),
    ):
        assert Cluster("", f"{host}:1", 0, 2).on_loopback is loopback


def test_slurm(environment):
    environment(SLURM)
    assert detect(Processes()) == Cluster("SLURM", "node007:61443", 5, 8, (1,))
    environment(SLURM | {"SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NODELIST": "a1,b2"})
    # One process a node: all of its devices.
    assert detect(Processes()) == Cluster("SLURM", "a1:61443", 5, 8, None)
    assert detect(Processes(coordinator="a1:9")).coordinator == "a1:9"
    environment(SLURM | {"JAX_COORDINATOR_PORT": "77"})
    assert detect(Processes()).coordinator == "node007:77"


def test_open_mpi(environment):
    environment(OPEN_MPI)
    assert detect(Processes()) == Cluster("Open MPI", "10.96.0.1:61442", 3, 4, (1,))
    environment(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert detect(Processes()).local_devices is None
    five = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    environment(five | {"OMPI_VERSION": "5.0.1"})
    # Version 5 does not tell where process 0 is; its numbers are known all the same.
    with pytest.raises(ValueError, match=r"Open MPI: cannot tell.*mpi4py.*give --coordinator"):
        detect(Processes())
    assert detect(Processes(coordinator="h:5")) == Cluster("Open MPI", "h:5", 3, 4, (1,))


def test_gke(environment):
    environment(GKE, tpu=True)
    # The third of four hosts in the second of two slices.
    assert detect(Processes()) == Cluster("TPU pod on GKE", "localhost:8482", 6, 8, None)
    environment(GKE, tpu=False)  # the names alone make no TPU
    assert detect(Processes()) is None


def test_kubernetes_without_its_package(environment):
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    with pytest.raises(ValueError, match=r"indexed Kubernetes job.*install jax\[k8s\]"):
        detect(Processes())
    assert detect(Processes(num_processes=1)) is None


@pytest.mark.parametrize(
    ("spoilt", "cause"),
    [
        ({"SLURM_PROCID": "8"}, "process id 8 with 8 processes"),
        ({"SLURM_NTASKS": "many"}, "SLURM: cannot tell the processes .*many"),
    ],
)
def test_an_environment_that_cannot_be(environment, spoilt, cause):
    environment(SLURM | spoilt)
    with pytest.raises(ValueError, match=cause):
        detect(Processes())


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--process-id 2 --num-processes 2 --coordinator localhost:1", "must be from 0 to 1"),
        ("--process-id -1 --num-processes 2 --coordinator localhost:1", "must be from 0 to 1"),
        ("--process-id 0 --num-processes 0 --coordinator localhost:1", "must be at least 1"),
        ("--process-id 0 --num-processes 2 --coordinator localhost", "must be HOST:PORT"),
        ("--process-id 0 --num-processes 2 --coordinator :12", "must be HOST:PORT"),
        ("--process-id 0 --num-processes 2 --coordinator localhost:99999", "must be HOST:PORT"),
        ("--process-id 0 --num-processes 2", "--coordinator missing, and neither SLURM"),
        ("--coordinator localhost:1", "--process-id and --num-processes missing"),
        ("--num-processes 2 --peer-timeout nan", "--peer-timeout nan must be"),
    ],
)
def test_bad_flags_are_one_line(environment, capsys, tmp_path, flags, cause):
    assert main(["train", "demo", "--run-dir", str(tmp_path / "run"), *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mmx: error: ")
    assert err.count("\n") == 1
    assert cause in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- meeting


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def cluster(port, process, count):
    return Cluster("by hand", f"127.0.0.1:{port}", process, count)


def gather(calls):
    """Run calls side by side; what each returned or raised, and the seconds it took."""
    results = [None] * len(calls)

    def one(number, call):
        begin = time.monotonic()
        try:
            results[number] = call()
        except ValueError as error:
            results[number] = str(error), time.monotonic() - begin

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def attend(port, process, count, *, timeout=20.0, delay=0.0, **about):
    def call():
        time.sleep(delay)
        return meet(cluster(port, process, count), about, timeout=timeout)

    return call


def test_four_meet_in_any_order_and_hear_of_a_death():
    port = free_port()
    calls = [attend(port, n, 4, delay=0.1 * (3 - n), seed="1") for n in range(4)]
    found = gather(calls)
    with pytest.raises(ConnectionRefusedError):  # the port is free for jax's service
        socket.create_connection(("127.0.0.1", port), 1)
    heard, order = {}, []
    events = [threading.Event() for _ in found]
    for number, peers in enumerate(found):

        def lost(process, words, code, number=number):
            heard[number] = (process, words, code)
            events[number].set()

        peers.watch(lost)

    def first(number):
        with found[number].first_alone():
            order.append(number)

    waiting = [threading.Thread(target=first, args=(n,)) for n in (1, 2, 3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    assert order == []
    first(0)
    for thread in waiting:
        thread.join(10)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2, 3]
    found[3].done()
    found[3].close()  # may go: it has said so
    time.sleep(0.3)
    assert heard == {}
    found[2]._connections[0].socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for the dead
    assert events[0].wait(5)
    assert events[1].wait(5)
    assert heard[0] == heard[1] == (2, None, 1)
    for peers in found:
        peers.close()


def test_last_words_reach_the_others():
    port = free_port()
    found = gather([attend(port, n, 3) for n in range(3)])
    heard, events = {}, [threading.Event() for _ in found]
    for number, peers in enumerate(found):

        def lost(*told, number=number):
            heard[number] = told
            events[number].set()

        peers.watch(lost)
    found[1].failed("no space left", 2)
    assert events[0].wait(5)
    assert events[2].wait(5)
    assert heard == {0: (1, "no space left", 2), 2: (1, "no space left", 2)}
    for peers in found:
        peers.close()


def test_who_does_not_come_is_named():
    port = free_port()
    # Who came is not named, even where it began to wait, and so to give up, before process 0 did.
    waits = {0: 4.0, 1: 3.0, 3: 4.0}
    results = gather([attend(port, n, 5, timeout=seconds) for n, seconds in waits.items()])
    for told, seconds in results:
        assert told.startswith("processes 2, 4 of 5 did not come within 4 seconds")
        assert "--peer-timeout" in told
        assert 3.5 < seconds < 20
    told, _ = gather([attend(port, 1, 2, timeout=1.0)])[0]
    assert told.startswith(f"process 0 of 2 did not answer at 127.0.0.1:{port} within 1 seconds")


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*unused):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    lost = Cluster("by hand", "nohost.invalid:99", 1, 2)
    with (
        pytest.warns(match=r"nohost\.invalid does not resolve \(Name or .*trying on for 1 s"),
        pytest.raises(ValueError, match=r"'nohost\.invalid' did not resolve within 1 seconds"),
    ):
        meet(lost, {}, timeout=1.0)


def test_many_missing_are_counted():
    told, _ = gather([attend(free_port(), 0, 500, timeout=0.2)])[0]
    assert told.startswith("processes 1, 2, 3, 4, 5, 6, 7, 8 and 491 more of 500 did not come")


def test_other_configurations_are_named():
    port = free_port()
    abouts = [{"seq_len": "256", "seed": "1"}, {"seq_len": "256", "seed": "1"},
              {"seq_len": "128", "seed": "1"}]  # fmt: skip
    results = gather([attend(port, n, 3, **about) for n, about in enumerate(abouts)])
    wanted = "process 2 has seq_len = 128, process 0 has 256; start all processes with the same"
    for told, seconds in results:
        assert told.startswith(wanted)
        assert seconds < 10  # at once, not at the end of the time


def test_two_with_one_number_and_two_counts():
    port = free_port()
    zero, *ones = gather([attend(port, 0, 3), attend(port, 1, 3), attend(port, 1, 3)])
    assert "two processes are number 1" in zero[0]
    assert sorted("there is another" in told for told, _ in ones) == [False, True]
    port = free_port()
    for told, _ in gather([attend(port, 0, 2), attend(port, 1, 3)]):
        assert told.startswith("process 1 was started as one of 3, process 0 as one of 2")


def test_strangers_do_not_disturb(monkeypatch):
    """What is not ours at the port is closed: junk, lines without end, an early hang-up."""
    monkeypatch.setattr(meeting, "MAX_MESSAGE", 1 << 12)
    port = free_port()

    def stranger(data):
        def call():
            for _ in range(100):
                try:
                    found = socket.create_connection(("127.0.0.1", port), 1)
                    break
                except OSError:
                    time.sleep(0.05)
            with found:
                found.sendall(data)
                found.settimeout(5)
                try:
                    return found.recv(1 << 16)
                except OSError:
                    return b""

        return call

    hello = json.dumps({"process": 1, "of": 3, "about": [1]}).encode() + b"\n"
    junk = (
        b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 9000, b"", hello, b"[" * 3000 + b"\n",
        b'{"process": true, "of": 3, "about": {}}\n', b'{"process": 1, "about": {}}\n',
        b'{"process": true, "about": {}}\n',
    )  # fmt: skip
    calls = [attend(port, n, 3, delay=0.5 * n) for n in range(3)]
    results = gather(calls + [stranger(data) for data in junk])
    for peers in results[:3]:
        assert not isinstance(peers, tuple)
        peers.close()


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told, _ = gather([attend(port, 0, 2, timeout=1.0)])[0]
        assert told.startswith(f"process 0 cannot listen at port {port} (Address already in use)")
        # Another server there is not process 0, however it behaves.
        told, _ = gather([attend(port, 1, 2, timeout=1.0)])[0]
        assert told.startswith("process 0 of 2 did not answer")


def test_what_is_compared(tmp_path):
    @dataclass
    class Recipe:
        corpus: Path | None
        seq_len: int
        run_dir: Path

    about = recipes_processes.describe(Recipe(tmp_path, 5, tmp_path))
    assert about["seq_len"] == "5"
    assert about["corpus_sha256"] == "none"
    assert {"jax", "mmx", "run_dir"} <= about.keys()
    (tmp_path / "manifest.json").write_text("{}")
    known = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert recipes_processes.describe(Recipe(tmp_path, 5, tmp_path))["corpus_sha256"] == known
    assert "corpus_sha256" not in recipes_processes.describe(Recipe(None, 5, tmp_path))

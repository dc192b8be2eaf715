"""Which processes train together: flags, what the environment says, and jax's runtime over them.

jax knows SLURM, Open MPI, TPU pods (on GKE or not) and Kubernetes jobs (`jax._src.clusters`); this
asks it, so that a run can say what was found before anything waits. `sharding.peers` waits.
"""

import importlib.util
import ipaddress
import os
from dataclasses import dataclass
from typing import Any

REMEDY = "give --coordinator, --process-id and --num-processes"


@dataclass(frozen=True)
class Processes:
    """How this process finds the others; what is not given is asked of the environment."""

    coordinator: str | None = None
    """HOST:PORT of process 0; none: as SLURM, Open MPI, Kubernetes or a TPU pod say."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """Processes in all; 1: this one, whatever the environment says."""
    peer_timeout: float = 50.0
    """Seconds to wait for the other processes to start."""


@dataclass(frozen=True)
class Cluster:
    """Where this process stands among several.

    Attributes:
      found: who said so, in words.
      coordinator: 'host:port' of process 0.
      process_id, num_processes: 0 <= process_id < num_processes, at least 2 of them.
      local_devices: numbers of the accelerators of this host that are this process'; None for all.
    """

    found: str
    coordinator: str
    process_id: int
    num_processes: int
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """Of the coordinator, without the brackets of an IPv6 address."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of the coordinator."""
        return int(self.coordinator.rpartition(":")[2])

    @property
    def on_loopback(self) -> bool:
        """Whether all processes are on this machine and nothing need listen to others."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def describe(self) -> str:
        """What was found, in one line."""
        return (
            f"process {self.process_id} of {self.num_processes} ({self.found}), "
            f"coordinator {self.coordinator}"
        )


def detect(asked: Processes) -> Cluster | None:
    """The processes this one belongs to; None when it is alone.

    Args:
      asked: flags; each one given goes before what the environment says.

    Raises:
      ValueError: flags that contradict each other, that are too few where the environment says
        nothing, or an environment that says only half.
    """
    _check(asked)
    if asked.num_processes == 1:
        return None
    given = (asked.coordinator, asked.process_id, asked.num_processes)
    found, kind = ("by hand", None) if None not in given else _environment()
    if kind is None and None in given:
        if given == (None, None, None):
            return None
        raise ValueError(
            f"{' and '.join(_missing(asked))} missing, and neither SLURM, Open MPI, Kubernetes nor "
            f"a TPU pod was found to tell: {REMEDY}"
        )
    try:
        cluster = _complete(asked, found, kind)
    except (RuntimeError, ValueError, LookupError, OSError, ImportError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{found}: cannot tell the processes ({cause}); {REMEDY}") from None
    if cluster is not None and not 0 <= cluster.process_id < cluster.num_processes:
        raise ValueError(
            f"process id {cluster.process_id} with {cluster.num_processes} processes ({found}); "
            f"their numbers are 0 to {cluster.num_processes - 1}"
        )
    return cluster


def start(cluster: Cluster, *, timeout: float) -> None:
    """Start jax's runtime over all processes; call it before anything touches a device.

    All of them must be known to be there (`sharding.peers`): where one is not, jax aborts the
    process after `timeout` seconds.
    """
    import jax

    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        # An empty list is every device; None would make jax ask the environment again.
        local_device_ids=list(cluster.local_devices or ()),
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout)),
        coordinator_bind_address=cluster.coordinator if cluster.on_loopback else None,
    )


def _check(asked: Processes) -> None:
    """Refuse flags that are wrong whatever the environment says."""
    count, number = asked.num_processes, asked.process_id
    if count is not None and count < 1:
        raise ValueError(f"--num-processes {count} must be at least 1")
    if number is not None and (number < 0 or (count is not None and number >= count)):
        most = "at least 0" if count is None else f"from 0 to {count - 1}"
        raise ValueError(f"--process-id {number} must be {most}, below --num-processes")
    if not 0 < asked.peer_timeout <= 86_400:
        raise ValueError(f"--peer-timeout {asked.peer_timeout} must be from 0 to 86400 seconds")
    if asked.coordinator is not None:
        host, _, port = asked.coordinator.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(
                f"--coordinator {asked.coordinator!r} must be HOST:PORT, with a port from 1 to "
                "65535 that is free on the host of process 0"
            )


def _missing(asked: Processes) -> list[str]:
    names = ("coordinator", "process_id", "num_processes")
    return [f"--{n.replace('_', '-')}" for n in names if getattr(asked, n) is None]


def _environment() -> tuple[str, Any]:
    """Name and jax's class of the environment this process was started in; None when alone."""
    from jax._src import clusters

    kinds = (
        ("Open MPI", clusters.OmpiCluster),
        ("SLURM", clusters.SlurmCluster),
        ("TPU pod on GKE", clusters.GkeTpuCluster),
        ("TPU pod", clusters.GceTpuCluster),
    )
    for found, kind in kinds:
        if kind.is_env_present():
            return found, kind
    # Any pod has KUBERNETES_SERVICE_HOST; those of an indexed job know their number.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        if importlib.util.find_spec("kubernetes") is None:
            raise ValueError(
                "an indexed Kubernetes job was found, and without the package kubernetes its size "
                f"is not known; install jax[k8s], or {REMEDY} (--num-processes 1: alone)"
            )
        if clusters.K8sCluster.is_env_present():
            return "Kubernetes", clusters.K8sCluster
    return "", None


def _complete(asked: Processes, found: str, kind: Any) -> Cluster | None:
    """Flags first, then what the environment says."""
    if kind is None:
        assert asked.coordinator is not None
        assert asked.process_id is not None
        assert asked.num_processes is not None
        return Cluster(found, asked.coordinator, asked.process_id, asked.num_processes)
    count, number = asked.num_processes, asked.process_id
    if found == "Open MPI":
        # In every version of it; jax asks mpi4py for those of version 5.
        count = count or int(os.environ["OMPI_COMM_WORLD_SIZE"])
        number = int(os.environ["OMPI_COMM_WORLD_RANK"]) if number is None else number
    one_host = found == "TPU pod on GKE" and not _hosts_of(kind)
    count = count or (1 if one_host else kind.get_process_count())
    if count == 1:
        return None
    number = kind.get_process_id() if number is None else number
    coordinator = asked.coordinator or kind.get_coordinator_address(
        timeout_secs=int(asked.peer_timeout),
        override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
    )
    return Cluster(found, coordinator, number, count, _local_devices(found))


def _hosts_of(kind: Any) -> bool:
    """Whether a TPU pod has other hosts; jax would ask a server about slices there are none of."""
    return len(kind._get_worker_list_in_slice()) > 1 or "MEGASCALE_NUM_SLICES" in os.environ


def _local_devices(found: str) -> tuple[int, ...] | None:
    """One accelerator a process where a host has several processes; else all of the host's."""
    environ = os.environ
    if found == "SLURM":
        # jax gives a process one device even where it is alone on its node.
        alone = environ.get("SLURM_STEP_NUM_NODES") == environ["SLURM_NTASKS"]
        return None if alone else (int(environ["SLURM_LOCALID"]),)
    if found == "Open MPI" and environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1":
        return (int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),)
    return None

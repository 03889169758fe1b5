"""A real Ray cluster of several nodes on one machine, in a process of its own, on the loopback interface alone.

Reads a line at a time from stdin and answers each with one on stdout: `add` starts a node and tells its id, `kill ID`
ends a node with all that runs on it, as a preempted box ends. The first line is the cluster's address.
"""

import os
import sys

import psutil

LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which also has Ray look for no other interface
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    os.environ.update(LOOPBACK)
    from ray.cluster_utils import Cluster

    arguments = {"node_ip_address": "127.0.0.1", "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "num_cpus": 0})
    nodes = {}
    say(str(cluster.address))
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                node = cluster.add_node(node_ip_address="127.0.0.1", num_cpus=1)
                nodes[node.node_id] = node
                say(node.node_id)
            case ["kill", name]:
                node = nodes.pop(name)
                end_all(node)
                cluster.remove_node(node, allow_graceful=False)
                say("killed")
    cluster.shutdown()


def end_all(node) -> None:
    """The raylet with its relays and their workers: a box that is gone leaves nothing behind."""
    roots = [psutil.Process(started.process.pid) for of in node.all_processes.values() for started in of]
    everything = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    for process in everything:
        if process.is_running():
            process.kill()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Memory and time of loading a model onto a mesh of virtual CPU devices.

    python benchmarks/sharded_load.py MODEL [--mesh expert=8] [--dtype bfloat16]

Prints what the devices hold together and by how much this process's own memory grew at most: pages mapped from the
checkpoint can be dropped at any time and do not count.
"""

import argparse
import os
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

import vl2_jax


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mesh", default="expert=8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-verify", action="store_true")
    options = parser.parse_args()
    jax.devices()
    before, peak, ended = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    vl2 = vl2_jax.load(options.model, mesh=options.mesh, dtype=options.dtype, verify=not options.no_verify)
    seconds = time.perf_counter() - begun
    ended.set()
    watcher.join()
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(vl2.params) for shard in leaf.addressable_shards)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(vl2.params))
    print(f"devices hold {held / 1e9:.2f} GB, the largest parameter {largest / 1e9:.2f} GB; loaded in {seconds:.1f} s")
    print(f"own memory grew by {(peak - before) / 1e9:.2f} GB at most (on a CPU, parts may stay mapped from the files)")


if __name__ == "__main__":
    main()

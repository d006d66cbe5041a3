"""Job of gpu.py: what there is."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import job

PACKAGES = ("jax", "jaxlib", "flax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tokamax")


def main() -> None:
    flags = job.parse_flags()
    found = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    job.write(flags, found)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        found["nvidia-smi"] = None
    job.write(flags, found)
    import jax
    from jax._src.lib import cuda_versions

    device = jax.devices()[0]
    found["devices"] = len(jax.devices())
    found["card"] = device.device_kind
    found["compute_capability"] = getattr(device, "compute_capability", None)
    found["memory"] = (device.memory_stats() or {}).get("bytes_limit")
    found["cudnn"] = cuda_versions.cudnn_get_version() if cuda_versions and flags.on_gpu else None
    job.write(flags, found)
    if flags.on_gpu and device.platform != "gpu":
        sys.exit("jax sees no GPU: pip install 'jax[cuda12]' or 'jax[cuda13]', whichever the driver supports")


if __name__ == "__main__":
    main()

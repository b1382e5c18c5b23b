"""Every setting of ROSE, with a sentence under each.

A setting comes from the environment (`ROSE_PORT=9000`), else from `rose.toml` (in the folder named by `ROSE_CONFIG`,
else the platform's configuration folder), else from the default here. Settings are loaded once at the start of a
process and passed in; nothing reads them at import.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_origin

import msgspec
import platformdirs

from rose.errors import InvalidRequest

DEFAULT_ALIASES: Mapping[str, str] = {
    "qwen-coder": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
WEIGHTS = ("auto", "fp32", "fp16", "bf16")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_project_jobs",
    "max_project_bytes",
    "max_project_event_streams",
)
"""Settings that limit every project; without a value each is off."""
SHORTEST_MEMORY_SECONDS = 600.0
"""Longer than any retry of a request or of a trainer's append lasts."""
DEVICE = re.compile(r"(auto|cpu|mps|cuda(:\d+)?)\Z")


def default_data_dir() -> Path:
    """Return the platform's data folder, or `/var/lib/rose` for root, below which Postgres can drop its rights."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/rose")
    return Path(platformdirs.user_data_dir("rose", appauthor=False))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings; see each field."""

    data_dir: Path = msgspec.field(default_factory=default_data_dir)
    """Folder of the embedded services, blobs, logs and built models."""
    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: int = 8004
    """Port of the API."""
    database_url: str | None = None
    """Postgres to use; without one `rose up` runs its own."""
    nats_url: str | None = None
    """NATS to use; without one `rose up` runs its own."""
    nats_token: str | None = None
    """Token for a NATS that takes one; the user's name and password can stand in the URL, too."""
    nats_users_file: Path | None = None
    """File of readers that the NATS server includes; `rose up` sets it for its own server, and nobody else needs it."""
    nats_replicas: int = 1
    """Copies of the JetStream stream, 1 to 5."""
    nats_max_bytes: int = 1 << 30
    """Size at which the JetStream stream drops its oldest messages (Postgres keeps them)."""
    nats_max_age_seconds: float = 30 * 86400.0
    """Age at which the JetStream stream drops messages (Postgres keeps them)."""
    blob_dir: Path | None = None
    """Folder of files and adapters, shared by all hosts; default: `blobs` in the data folder."""
    public_url: str | None = None
    """Address under which people reach the API, for messages; default: made from host and port."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    api_keys: tuple[str, ...] = ()
    """Keys that clients may use; empty: any key, which is allowed on a loopback address only."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that browsers may call the API from."""
    model_aliases: dict[str, str] = msgspec.field(default_factory=lambda: dict(DEFAULT_ALIASES))
    """Name -> hub id, local folder or `tiny`; added to the built-in aliases."""
    base_learning_rates: dict[str, float] = msgspec.field(default_factory=dict)
    """Base learning rate by base source, where the formula does not fit the model."""
    minimum_examples: int = 1
    """Fewest training examples a job may have."""
    max_upload_bytes: int = 512 << 20
    """Largest file that can be uploaded in one piece."""
    max_upload_in_parts_bytes: int = 8 << 30
    """Largest file that can be uploaded in parts (`/v1/uploads`)."""
    min_free_bytes: int = 256 << 20
    """Free disk space under which uploads and job creation are refused and running jobs pause."""
    requests_per_minute: int | None = None
    """Requests that a project may make in a minute, counted by each API process for itself; default: any number."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers that a project may have in a minute, counted likewise; default: any number."""
    max_project_jobs: int | None = None
    """Jobs that a project may have that have not ended; default: any number."""
    max_project_bytes: int | None = None
    """Bytes that a project may store in files, announced uploads, models and checkpoints; default: any number."""
    max_project_event_streams: int | None = None
    """Event streams that a project may have open at each API process; default: any number."""
    result_file_encoding: str = "plain"
    """`plain` CSV, or `base64` as the hosted service sends it."""
    idempotency_seconds: float = 86400.0
    """How long a repeated request (`Idempotency-Key`) gets the answer of the first one; then it is a new one."""
    lease_seconds: float = 60.0
    """How long a claim on a job lasts without renewal."""
    renew_seconds: float = 5.0
    """How often a trainer renews its lease."""
    abandon_seconds: float = 45.0
    """How long after the last good renewal a run is killed; also how long a child waits for its supervisor."""
    stall_seconds: float = 60.0
    """Least time without a training step after which a run counts as hung (else ten median steps)."""
    phase_seconds: float = 900.0
    """Longest time that loading, one evaluation or one save may take."""
    max_attempts: int = 3
    """Consecutive attempts without a new recovery point after which a job fails."""
    recovery_seconds: float = 120.0
    """Time between recovery points."""
    recovery_steps: int | None = None
    """Steps between recovery points, in addition to the time."""
    poll_seconds: float = 2.0
    """How often a waiting trainer looks for work without being woken."""
    drain_seconds: float = 30.0
    """How long Ctrl-C waits for a run to make its recovery point."""
    torch_threads: int | None = None
    """Threads of a training child; default: cores minus one."""
    warm_child: bool = True
    """Keep a training child waiting that has torch loaded, so that a job starts at once; docs/operations.md has the
    memory it takes."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    inference_host: str = "127.0.0.1"
    """Address that an inference engine listens on."""
    inference_port: int = 0
    """Port of an inference engine; 0 takes a free one."""
    inference_token: str | None = None
    """Shared secret between API, trainers and engines; required when an engine does not listen on loopback."""
    inference_idle_seconds: float = 1800.0
    """Idle time after which an engine drops a base model."""
    engine_wait_seconds: float = 30.0
    """How long a chat waits for an inference engine that is full or starts again, before it gets 503; 0: not at all."""
    proof_seconds: float = 120.0
    """How long a job whose model is made waits for an engine to give the trainer's numbers; 0: it is not asked."""
    inference_threads: int | None = None
    """Threads of the inference engine; default: cores minus one."""
    inference_weights: str = "auto"
    """Form of a base's weights on a CPU: auto (the fastest here), fp16 (arithmetic in fp32), bf16 or fp32."""
    inference_cache_bytes: int | None = None
    """Memory for keys and values of each loaded base; default: a quarter of what is free once it is loaded."""
    inference_adapters: int = 32
    """Adapters that an engine keeps on one base at a time; more take turns."""
    webhook_private_targets: bool = False
    """Let webhooks go to plain http and to addresses of this machine and of private networks."""
    hub_offline: bool = False
    """Never ask the model hub; only what is in its cache or in a folder is used."""

    @property
    def blobs(self) -> Path:
        """The blob folder."""
        return self.blob_dir or self.data_dir / "blobs"

    @property
    def logs(self) -> Path:
        """Folder with one log file per process and per run."""
        return self.data_dir / "logs"

    @property
    def models(self) -> Path:
        """Folder of models that ROSE builds itself."""
        return self.data_dir / "models"

    @property
    def url(self) -> str:
        """Address of the API for people and the command line."""
        if self.public_url:
            return self.public_url
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def config_path(environ: Mapping[str, str]) -> Path:
    """Return the path of `rose.toml`."""
    folder = environ.get("ROSE_CONFIG")
    return (Path(folder) if folder else Path(platformdirs.user_config_dir("rose", appauthor=False))) / "rose.toml"


def load(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Return the settings from environment, `rose.toml` and `overrides` (which win when not None).

    Raises: InvalidRequest naming the setting when a value cannot be used or a name in the file is unknown.
    """
    environ = os.environ if environ is None else environ
    path = config_path(environ)
    stored = _stored(path)
    values: dict[str, Any] = {}
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    for name in stored:
        if name not in fields:
            raise InvalidRequest(f"{path}: there is no setting {name!r}.", code="invalid_setting", param=name)
    for name, field in fields.items():
        text = environ.get(f"ROSE_{name.upper()}")
        raw: Any = overrides.get(name)
        try:
            if raw is None:
                raw = _parse(field.type, text) if text not in (None, "") else stored.get(name)
            if raw is not None:
                values[name] = msgspec.convert(raw, field.type, strict=False, dec_hook=_decode)
        except (msgspec.ValidationError, ValueError) as error:
            raise _unusable(name, text if raw is None else raw, f": {error}") from None
    if "model_aliases" in values:
        values["model_aliases"] = {**DEFAULT_ALIASES, **values["model_aliases"]}
    for name in ("data_dir", "blob_dir"):
        if values.get(name) is not None:
            values[name] = Path(values[name]).expanduser().absolute()
    settings = Settings(**values)
    _check(settings)
    return settings


def _stored(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text()) if path.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not valid TOML: {error}.", code="invalid_setting") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", code="invalid_setting") from None


def _check(settings: Settings) -> None:
    """Refuse values of the right kind that cannot work. Raises: InvalidRequest naming the setting and its range."""
    order = settings.renew_seconds < settings.abandon_seconds < settings.lease_seconds
    rules = (
        ("port", 1 <= settings.port <= 65535, "it must be from 1 to 65535"),
        ("inference_port", 0 <= settings.inference_port <= 65535, "it must be from 0 (any) to 65535"),
        ("log_level", settings.log_level.upper() in LOG_LEVELS, f"it must be one of {', '.join(LOG_LEVELS)}"),
        ("device", DEVICE.match(settings.device) is not None, "it must be auto, cpu, cuda, cuda:N or mps"),
        (
            "result_file_encoding",
            settings.result_file_encoding in ("plain", "base64"),
            "it must be plain or base64",
        ),
        ("renew_seconds", settings.renew_seconds > 0, "it must be above 0"),
        (
            "abandon_seconds",
            order,
            f"it must lie between renew_seconds ({settings.renew_seconds:g}) and lease_seconds "
            f"({settings.lease_seconds:g}), so that a run ends before another trainer may take its job",
        ),
        ("engine_wait_seconds", settings.engine_wait_seconds >= 0, "it must be 0 or above"),
        ("proof_seconds", settings.proof_seconds >= 0, "it must be 0 or above"),
        (
            "idempotency_seconds",
            settings.idempotency_seconds >= SHORTEST_MEMORY_SECONDS,
            f"it must be at least {SHORTEST_MEMORY_SECONDS:g}, so that retries of SDKs and of trainers are recognised",
        ),
        ("poll_seconds", settings.poll_seconds > 0, "it must be above 0"),
        ("recovery_steps", settings.recovery_steps is None or settings.recovery_steps > 0, "it must be above 0"),
        ("max_attempts", settings.max_attempts > 0, "it must be above 0"),
        ("minimum_examples", settings.minimum_examples > 0, "it must be above 0"),
        *((name, _is_limit(getattr(settings, name)), "it must be above 0") for name in LIMITS),
        ("torch_threads", settings.torch_threads is None or settings.torch_threads > 0, "it must be above 0"),
        ("inference_weights", settings.inference_weights in WEIGHTS, f"it must be one of {', '.join(WEIGHTS)}"),
        ("inference_adapters", settings.inference_adapters > 0, "it must be above 0"),
        ("inference_cache_bytes", _is_limit(settings.inference_cache_bytes), "it must be above 0"),
        (
            "inference_threads",
            settings.inference_threads is None or settings.inference_threads > 0,
            "it must be above 0",
        ),
    )
    for name, holds, rule in rules:
        if not holds:
            raise _unusable(name, getattr(settings, name), f"; {rule}")


def _is_limit(value: int | None) -> bool:
    return value is None or value > 0


def _unusable(name: str, value: Any, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The setting {name} (ROSE_{name.upper()}) is {value!r}{why}.", code="invalid_setting", param=name
    )


def to_environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables from which `load` makes these settings again, for child processes."""
    built = msgspec.to_builtins(settings, enc_hook=str)
    return {
        f"ROSE_{name.upper()}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in built.items()
        if value is not None
    }


def _parse(kind: Any, text: str | None) -> Any:
    """Turn an environment variable's text into what `msgspec.convert` takes; maps are JSON or `name=value,…`."""
    if text is None or kind in (str, Path):
        return text
    stripped = text.strip()
    if stripped[:1] in "[{":
        try:
            return msgspec.json.decode(stripped)
        except msgspec.DecodeError:
            return text
    if get_origin(kind) is dict:
        pairs = [pair.strip() for pair in stripped.split(",") if pair.strip()]
        wrong = [pair for pair in pairs if "=" not in pair]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not name=value")
        return {name.strip(): value.strip() for name, _, value in (pair.partition("=") for pair in pairs)}
    if get_origin(kind) is tuple:
        return [part.strip() for part in stripped.split(",") if part.strip()]
    if kind is bool:
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }.get(stripped.lower(), text)
    return text


def _decode(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


def is_inside(host: str) -> bool:
    """Tell whether only this machine can reach what listens on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""No answer to one project depends on another one: the same calls get the same answers with and without neighbours.

Two installations are asked the same by project A. In one of them project B works, too, with the same names and keys,
and A also tries what is B's; in the other one stands in its place an id that never was. Each of A's answers must be the
same in both, but for ids and times.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from rose.ids import new_id
from rose.log.migrate import migrate
from rose.log.pool import open_pool
from rose.settings import load
from tests.api.conftest import serving
from tests.api.running import SEED, Running, Trainer, free_port
from tests.conftest import _execute, _with_database
from tests.in_own_loop import in_own_loop
from tests.services import private_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KINDS = ("file", "ftjob", "ftckpt", "upload", "cp", "whe")
ID = re.compile(r"\b(file|ftjob|ftevent|ftckpt|upload|part|cp|wh|proj|key|svc_acct|req|whe|evt)_[A-Za-z0-9]{10,40}")
MOMENT = re.compile(r"\b1[6-9]\d{8}\b")
STAMP = re.compile(r"-ft-\d{8}_\d{6}(-\d+)?")
FOLDER = re.compile(r"/tmp/[^\"\\]+?/blobs")
PORT = re.compile(r"127\.0\.0\.1:\d+")
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=…]+")
LASTED = re.compile(r'"execution_time":[-\d.e]+')
TAG = re.compile(r'"sha256":"[0-9a-f]{64}"')


PATHS = {
    "file": (("GET", "/files/{}"), ("GET", "/files/{}/content"), ("DELETE", "/files/{}")),
    "ftjob": (
        ("GET", "/fine_tuning/jobs/{}"),
        ("POST", "/fine_tuning/jobs/{}/cancel"),
        ("POST", "/fine_tuning/jobs/{}/pause"),
        ("POST", "/fine_tuning/jobs/{}/resume"),
        ("GET", "/fine_tuning/jobs/{}/events"),
        ("GET", "/fine_tuning/jobs/{}/events?stream=true"),
        ("GET", "/fine_tuning/jobs/{}/checkpoints"),
        ("GET", "/fine_tuning/jobs/{}/metrics"),
        ("GET", "/fine_tuning/jobs?after={}"),
    ),
    "whe": (
        ("GET", "/webhook_endpoints/{}"),
        ("POST", "/webhook_endpoints/{}/rotate_secret"),
        ("POST", "/webhook_endpoints/{}/test"),
        ("DELETE", "/webhook_endpoints/{}"),
    ),
    "upload": (("POST", "/uploads/{}/cancel"), ("POST", "/uploads/{}/parts"), ("POST", "/uploads/{}/complete")),
}
LISTS = {"file": "/files", "ftjob": "/fine_tuning/jobs", "upload": "/models", "whe": "/webhook_endpoints"}
STEPS = ("", ":ckpt-step-2")
"""What follows the name of a model: nothing, or which checkpoint."""
HOOK = {"name": "same", "url": "http://127.0.0.1:9/hook", "event_types": ["fine_tuning.job.succeeded"]}


class Installation:
    """A ROSE in a thread of its own, with an administrator and the projects A and B."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._ready: queue.Queue[Running | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._work: queue.Queue[tuple[Callable[[Running], Any], queue.Queue[Any]]] = queue.Queue()

    def _run(self) -> None:
        try:
            in_own_loop(self._serve())
        except BaseException as error:
            self._ready.put(error)
            raise

    async def _serve(self) -> None:
        with private_folder() as folder:
            given = load(
                {"ROSE_CONFIG": "/nonexistent"},
                data_dir=str(folder),
                port=free_port(),
                min_free_bytes=0,
                engine_wait_seconds=0.0,
                webhook_private_targets=True,
            )
            await migrate(self._dsn)
            pool = await open_pool(self._dsn)
            async with serving(given, pool) as running:
                self._ready.put(running)
                while not self._stop.is_set():
                    try:
                        work, answer = self._work.get_nowait()
                    except queue.Empty:
                        await anyio.sleep(0.005)
                        continue
                    answer.put(await work(running))
            await pool.close()

    def play(self, work: Callable[[Running], Any]) -> Any:
        """Run a coroutine function in the installation's loop: what a trainer does there."""
        answer: queue.Queue[Any] = queue.Queue()
        self._work.put((work, answer))
        return answer.get(timeout=120)

    def __enter__(self) -> Installation:
        self._thread.start()
        ready = self._ready.get(timeout=120)
        if isinstance(ready, BaseException):
            raise ready
        self.url = ready.services.settings.url
        path = "/v1/organization/projects/default/service_accounts"
        admin = httpx2.post(self.url + path, json={"name": "admin", "scope": "admin"}, timeout=60).json()
        self.admin = admin["api_key"]["value"]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    def team(self, name: str) -> tuple[str, httpx2.Client]:
        """Make a project and return its id and a client with a key of it."""
        known = {"authorization": f"Bearer {self.admin}"}
        below = f"{self.url}/v1/organization/projects"
        project = httpx2.post(below, json={"name": name}, headers=known, timeout=60).json()["id"]
        body = {"name": name, "scope": "admin"}
        account = httpx2.post(f"{below}/{project}/service_accounts", json=body, headers=known, timeout=60).json()
        headers = {"authorization": f"Bearer {account['api_key']['value']}"}
        return project, httpx2.Client(base_url=f"{self.url}/v1", headers=headers, timeout=60)


class World:
    """One installation as a run of the machine sees it."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.project, self.a = installation.team("a")
        self.third, third = installation.team("c")
        """A project that others lend models to."""
        third.close()
        self.own: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "model", "ftevent")}
        self.names: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask as project A and return the answer without what may differ."""
        return self.neutral(self.raw(self.a, method, path, **options))

    def raw(self, client: httpx2.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = client.request(method, path, **options)
        kind = response.headers.get("content-type", "").partition(";")[0]
        replayed = response.headers.get("idempotent-replayed")
        return {"status": response.status_code, "type": kind, "replayed": replayed, "body": response.text}

    def neutral(self, answer: dict[str, Any]) -> dict[str, Any]:
        def named(found: re.Match[str]) -> str:
            if found[0] not in self.names:
                self.counts[found[1]] += 1
                self.names[found[0]] = f"{found[1]}#{self.counts[found[1]]}"
            return self.names[found[0]]

        text = FOLDER.sub("FOLDER", PORT.sub("HOST", answer["body"]))
        text = LASTED.sub('"execution_time":0', text)
        text = STAMP.sub("-ft-STAMP", SECRET.sub("SECRET", TAG.sub('"sha256":""', text)))
        return {**answer, "body": MOMENT.sub("T", ID.sub(named, text))}


class Neighbours(RuleBasedStateMachine):
    """A asks both installations; B only the first."""

    installations: tuple[Installation, Installation]

    @initialize()
    def begin(self) -> None:
        self.worlds = tuple(World(one) for one in self.installations)
        _, self.b = self.installations[0].team("b")
        self.bs: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "model", "ftevent")}
        self.reserved: set[str] = set()
        self.b_uploads(None, "b.jsonl")
        self.b_begins_an_upload()
        self.b_has_a_webhook()
        for succeeds in (True, False):
            self.train_as_b(self.bs["file"][0], succeeds=succeeds)
        self.b_lends_a_model()
        self.a_uploads(None, "a.jsonl")
        files = (self.worlds[0].own["file"][0], self.worlds[1].own["file"][0])
        self.train_as_a(files, ("tiny", "tiny"), suffix="own", succeeds=True)
        self.a_tries_everything_with_what_is_bs()
        self.a_tries_everything_with_models()

    def teardown(self) -> None:
        for client in (self.b, *(world.a for world in self.worlds)):
            client.close()

    def both(self, method: str, path: Callable[[int], str], **options: Any) -> list[dict[str, Any]]:
        """Ask both as A, demand the same answer, and return both as they came."""
        raw = [world.raw(world.a, method, path(number), **options) for number, world in enumerate(self.worlds)]
        first, second = (world.neutral(answer) for world, answer in zip(self.worlds, raw, strict=True))
        assert first == second, f"{method} {path(0)}"
        assert first["status"] < 500
        return raw

    def about(self, names: tuple[str, str], ask: Callable[[World, str], dict[str, Any]]) -> list[dict[str, Any]]:
        """Ask both as A about a model each, demand the same answer but for the name, and return both as they came."""
        raw = [ask(world, name) for world, name in zip(self.worlds, names, strict=True)]
        first, second = (
            world.neutral({**answer, "body": answer["body"].replace(name, "MODEL")})
            for world, answer, name in zip(self.worlds, raw, names, strict=True)
        )
        assert first == second
        return raw

    def note(self, raw: list[dict[str, Any]], kind: str) -> None:
        if raw[0]["status"] == 200:
            for world, answer in zip(self.worlds, raw, strict=True):
                world.own[kind].append(msgspec.json.decode(answer["body"])["id"])

    def pick(self, draw: Any, kind: str, *, foreign: bool) -> tuple[str, str]:
        """Return an id of that kind in each world: A's own, or B's and one that never was."""
        own = self.worlds[0].own[kind]
        # What A and B make in one second has one name, also when A's is only reserved for a job.
        foreigners = [one for one in self.bs[kind] if one not in own and one not in self.reserved]
        if foreign and foreigners:
            return self.beside_a_ghost(kind, draw.draw(st.sampled_from(foreigners)))
        if own:
            index = draw.draw(st.integers(0, len(own) - 1))
            return own[index], self.worlds[1].own[kind][index]
        return f"{kind}_none", f"{kind}_none"

    def beside_a_ghost(self, kind: str, wanted: str) -> tuple[str, str]:
        """Return an id of B's, and one that never was for the installation without B."""
        ghost = f"never-was-{len(wanted)}" if kind == "model" else new_id(f"{kind}_")
        for world, one in zip(self.worlds, (wanted, ghost), strict=True):
            world.names.setdefault(one, f"{kind}#foreign{wanted}")
        return wanted, ghost

    # --- what B does, in the first installation only

    @rule(key=st.sampled_from((None, "same-key")), name=st.sampled_from(("a.jsonl", "b.jsonl")))
    def b_uploads(self, key: str | None, name: str) -> None:
        headers = {"idempotency-key": key} if key else {}
        made = self.b.post("/files", files={"file": (name, SEED)}, data={"purpose": "fine-tune"}, headers=headers)
        if made.status_code == 200:
            self.bs["file"].append(made.json()["id"])

    @rule(draw=st.data(), succeeds=st.booleans())
    def b_trains(self, draw: Any, succeeds: bool) -> None:
        self.train_as_b(draw.draw(st.sampled_from(self.bs["file"])), succeeds=succeeds)

    def train_as_b(self, file: str, *, succeeds: bool) -> None:
        made = self.b.post(
            "/fine_tuning/jobs", json={"model": "tiny", "training_file": file, "suffix": "same", "seed": 1}
        )
        if made.status_code != 200:
            return
        job_id = made.json()["id"]
        self.bs["ftjob"].append(job_id)
        if succeeds:
            self.installations[0].play(lambda running: Trainer(running.services, job_id).run_to_success(2))
            self.bs["model"].append(self.b.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"])
        self.bs["ftevent"] += [one["id"] for one in self.b.get(f"/fine_tuning/jobs/{job_id}/events").json()["data"]]

    @rule()
    def b_begins_an_upload(self) -> None:
        body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(SEED), "mime_type": "text/plain"}
        made = self.b.post("/uploads", json=body)
        if made.status_code == 200:
            self.bs["upload"].append(made.json()["id"])

    @rule()
    def b_has_a_webhook(self) -> None:
        made = self.b.post("/webhook_endpoints", json=HOOK)
        if made.status_code == 200:
            self.bs["whe"].append(made.json()["id"])

    @rule()
    def b_lends_a_model(self) -> None:
        path = f"/fine_tuning/checkpoints/{self.bs['model'][-1]}/permissions"
        made = self.b.post(path, json={"project_ids": [self.worlds[0].third]})
        if made.status_code == 200:
            self.bs["cp"].append(made.json()["data"][0]["id"])

    # --- what A does, in both

    @rule()
    def a_has_a_webhook(self) -> None:
        self.note(self.both("POST", lambda _: "/webhook_endpoints", json=HOOK), "whe")
        self.both("GET", lambda _: "/webhook_endpoints")

    @rule(key=st.sampled_from((None, "same-key")), name=st.sampled_from(("a.jsonl", "b.jsonl", "c.txt")))
    def a_uploads(self, key: str | None, name: str) -> None:
        headers = {"idempotency-key": key} if key else {}
        form = {"files": {"file": (name, SEED)}, "data": {"purpose": "fine-tune"}, "headers": headers}
        self.note(self.both("POST", lambda _: "/files", **form), "file")

    @rule(draw=st.data(), foreign=st.booleans(), foreign_model=st.booleans(), succeeds=st.booleans())
    def a_trains(self, draw: Any, foreign: bool, foreign_model: bool, succeeds: bool) -> None:
        files = self.pick(draw, "file", foreign=foreign)
        models = self.pick(draw, "model", foreign=True) if foreign_model and self.bs["model"] else ("tiny", "tiny")
        self.train_as_a(files, models, suffix="same", succeeds=succeeds)

    def train_as_a(self, files: tuple[str, str], models: tuple[str, str], *, suffix: str, succeeds: bool) -> None:
        answers: list[dict[str, Any]] = []
        for world, file, model in zip(self.worlds, files, models, strict=True):
            body = {"model": model, "training_file": file, "suffix": suffix, "seed": 1}
            answers.append(world.raw(world.a, "POST", "/fine_tuning/jobs", json=body))
        first, second = (
            world.neutral({**answer, "body": answer["body"].replace(model, "MODEL")})
            for world, answer, model in zip(self.worlds, answers, models, strict=True)
        )
        assert first == second
        self.note(answers, "ftjob")
        if answers[0]["status"] == 200:
            self.reserved.add(msgspec.json.decode(answers[0]["body"])["reserved_model"])
        if succeeds and answers[0]["status"] == 200:
            for world in self.worlds:
                job_id = world.own["ftjob"][-1]
                world.installation.play(lambda running, job=job_id: Trainer(running.services, job).run_to_success(2))
                world.own["model"].append(world.a.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"])

    @rule(draw=st.data(), foreign=st.booleans(), kind=st.sampled_from(("file", "ftjob", "upload")), method=st.data())
    def a_looks_or_changes(self, draw: Any, foreign: bool, kind: str, method: Any) -> None:
        ids = self.pick(draw, kind, foreign=foreign)
        verb, path = method.draw(st.sampled_from(PATHS[kind]))
        self.both(verb, lambda number: path.format(ids[number]))

    @rule()
    def a_tries_everything_with_what_is_bs(self) -> None:
        for kind, paths in PATHS.items():
            for wanted in self.bs[kind][-1:]:
                ids = self.beside_a_ghost(kind, wanted)
                self.both("GET", lambda _, kind=kind: LISTS[kind])
                for verb, path in paths:
                    answers = self.both(verb, lambda number, path=path, ids=ids: path.format(ids[number]))
                    assert answers[0]["status"] != 200 or "after=" in path

    @rule(draw=st.data(), foreign=st.booleans(), kind=st.sampled_from(("file", "ftjob")), limit=st.integers(0, 3))
    def a_lists(self, draw: Any, foreign: bool, kind: str, limit: int) -> None:
        path = {"file": "/files", "ftjob": "/fine_tuning/jobs"}[kind]
        after = self.pick(draw, kind, foreign=foreign)
        self.both("GET", lambda number: f"{path}?limit={limit}&after={after[number]}")
        self.both("GET", lambda _: f"{path}?limit={limit}")
        self.both("GET", lambda _: "/models")

    @rule(draw=st.data(), foreign=st.booleans(), download=st.booleans())
    def a_looks_at_a_model(self, draw: Any, foreign: bool, download: bool) -> None:
        names = self.pick(draw, "model", foreign=foreign)
        part = "adapters" if download else "models"
        answers = [world.raw(world.a, "GET", f"/{part}/{name}") for world, name in zip(self.worlds, names, strict=True)]
        neutral = [
            world.neutral({**answer, "body": "" if download else answer["body"].replace(name, "MODEL")})
            for world, answer, name in zip(self.worlds, answers, names, strict=True)
        ]
        assert neutral[0] == neutral[1]

    @rule(draw=st.data(), foreign=st.booleans(), step=st.sampled_from(STEPS))
    def a_lends_a_model(self, draw: Any, foreign: bool, step: str) -> None:
        self.lend(self.pick(draw, "model", foreign=foreign), step, foreign=foreign)

    @rule(draw=st.data(), foreign=st.booleans(), foreign_permission=st.booleans(), withdraws=st.booleans())
    def a_looks_at_permissions(self, draw: Any, foreign: bool, foreign_permission: bool, withdraws: bool) -> None:
        permissions = self.pick(draw, "cp", foreign=foreign_permission)
        self.look(self.pick(draw, "model", foreign=foreign), permissions, withdraws=withdraws)

    @rule(draw=st.data(), foreign=st.booleans(), step=st.sampled_from(STEPS))
    def a_chats(self, draw: Any, foreign: bool, step: str) -> None:
        self.chat(self.pick(draw, "model", foreign=foreign), step, foreign=foreign)

    @rule(draw=st.data(), foreign=st.booleans(), runs=st.booleans(), plain=st.booleans())
    def a_grades(self, draw: Any, foreign: bool, runs: bool, plain: bool) -> None:
        self.grade(self.pick(draw, "model", foreign=foreign), runs=runs, plain=plain, foreign=foreign)

    @rule()
    def a_tries_everything_with_models(self) -> None:
        strange = self.beside_a_ghost("model", self.bs["model"][-1])
        own = (self.worlds[0].own["model"][-1], self.worlds[1].own["model"][-1])
        permissions = self.beside_a_ghost("cp", self.bs["cp"][-1])
        for models in (own, strange) if strange[0] not in self.reserved else (own,):
            for step in STEPS:
                self.lend(models, step, foreign=models is strange)
                self.chat(models, step, foreign=models is strange)
            for runs, plain in ((True, True), (True, False), (False, True), (False, False)):
                self.grade(models, runs=runs, plain=plain, foreign=models is strange)
            for withdraws in (False, True):
                self.look(models, permissions, withdraws=withdraws)

    def lend(self, models: tuple[str, str], step: str, *, foreign: bool) -> None:
        def ask(world: World, name: str) -> dict[str, Any]:
            path = f"/fine_tuning/checkpoints/{name}{step}/permissions"
            return world.raw(world.a, "POST", path, json={"project_ids": [world.third]})

        answers = self.about(models, ask)
        assert answers[0]["status"] == 404 or not foreign
        if answers[0]["status"] == 200:
            for world, answer in zip(self.worlds, answers, strict=True):
                world.own["cp"].append(msgspec.json.decode(answer["body"])["data"][0]["id"])

    def look(self, models: tuple[str, str], permissions: tuple[str, str], *, withdraws: bool) -> None:
        of_world = dict(zip(self.worlds, permissions, strict=True))

        def ask(world: World, name: str) -> dict[str, Any]:
            path = f"/fine_tuning/checkpoints/{name}/permissions"
            if withdraws:
                return world.raw(world.a, "DELETE", f"{path}/{of_world[world]}")
            return world.raw(world.a, "GET", f"{path}?after={of_world[world]}&order=ascending")

        self.about(models, ask)

    def chat(self, models: tuple[str, str], step: str, *, foreign: bool) -> None:
        def ask(world: World, name: str) -> dict[str, Any]:
            body = {"model": f"{name}{step}", "messages": [{"role": "user", "content": "Whose are you?"}]}
            return world.raw(world.a, "POST", "/chat/completions", json=body)

        assert self.about(models, ask)[0]["status"] == 404 or not foreign

    def grade(self, models: tuple[str, str], *, runs: bool, plain: bool, foreign: bool) -> None:
        def ask(world: World, name: str) -> dict[str, Any]:
            asked = [{"role": "user", "content": "Rate {{sample.output_text}}"}]
            grader: dict[str, Any] = {"type": "score_model", "name": "judge", "model": name, "input": asked}
            if plain:
                reference = {"input": "{{sample.output_text}}", "reference": name, "operation": "eq"}
                grader = {"type": "string_check", "name": "same", **reference}
            sample = {"model_sample": "well"} if runs else {}
            path = f"/fine_tuning/alpha/graders/{'run' if runs else 'validate'}"
            return world.raw(world.a, "POST", path, json={"grader": grader, **sample})

        status = self.about(models, ask)[0]["status"]
        assert status == (404 if foreign and not plain else status)

    @rule(draw=st.data(), foreign=st.booleans())
    def a_follows_the_events_of_a_job_that_has_ended(self, draw: Any, foreign: bool) -> None:
        ids = self.pick(draw, "ftjob", foreign=False)
        for world, job_id in zip(self.worlds, ids, strict=True):
            world.raw(world.a, "POST", f"/fine_tuning/jobs/{job_id}/cancel")
        if not foreign:
            self.both("GET", lambda number: f"/fine_tuning/jobs/{ids[number]}/events?stream=true")
        elif self.bs["ftevent"]:  # a cursor of B's: whatever A gets with it is A's own
            after = draw.draw(st.sampled_from(self.bs["ftevent"]))
            path = f"/fine_tuning/jobs/{ids[0]}/events?stream=true&after={after}"
            answer = self.worlds[0].raw(self.worlds[0].a, "GET", path)
            assert not any(one in answer["body"].replace(after, "") for ids in self.bs.values() for one in ids)


@contextmanager
def databases(dsn: str) -> Iterator[list[str]]:
    names = [f"rose_isolation_{number}_{new_id('')}" for number in range(2)]
    for name in names:
        in_own_loop(_execute(dsn, f"create database {name}"))
    yield [_with_database(dsn, name) for name in names]
    for name in names:
        in_own_loop(_execute(dsn, f"drop database {name} with (force)"))


def test_no_answer_to_a_project_depends_on_another_one(postgres_dsn: str) -> None:
    with databases(postgres_dsn) as dsns, ExitStack() as stack:
        first, second = (stack.enter_context(Installation(dsn)) for dsn in dsns)

        class Machine(Neighbours):
            installations = (first, second)

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=int(os.environ.get("ROSE_TEST_EXAMPLES", "6")),
                stateful_step_count=25,
                deadline=None,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )

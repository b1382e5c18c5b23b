"""Models through the official client: what is there, what is gone, and the files of one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from unittest.mock import ANY

import anyio
import msgspec
import openai
import pytest

from projections import jobs
from rose.language_models.locate import FACTS_FILE, Origin, RoseFacts
from rose.log.pool import Pool
from rose.settings import Settings
from tests.api.conftest import serving
from tests.api.running import BASE, Running, Trainer, free_port

pytestmark = pytest.mark.anyio


async def tuned(api: Running, path: Path) -> str:
    """Make a fine-tuned model and return its name."""
    job = await api.job(path, suffix="v1")
    await Trainer(api.services, job.id).run_to_success()
    name = (await api.openai.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert name is not None
    return name


async def test_bases_with_a_name_are_listed(api: Running) -> None:
    models = {model.id: model async for model in api.openai.models.list()}
    assert set(models) == {"tiny", "smollm2", "qwen-coder", "qwen2.5-0.5b", "tinyllama"}
    assert models["qwen-coder"].model_extra == {"kind": "base", "source": "Qwen/Qwen2.5-Coder-1.5B-Instruct"}
    assert (await api.openai.models.retrieve("tiny")).owned_by == "system"
    assert (await api.openai.models.retrieve("Qwen/Qwen2.5-0.5B-Instruct")).id == "Qwen/Qwen2.5-0.5B-Instruct"


async def test_an_imported_base_has_its_name_and_tells_its_origin(api: Running, seed_file: Path) -> None:
    with pytest.raises(openai.NotFoundError):
        await api.openai.models.retrieve("mine")
    folder = api.services.settings.models / "mine"
    folder.mkdir(parents=True)
    facts = RoseFacts(
        name="mine",
        version="0123456789ab",
        about="Imported from some.gguf.",
        origin=Origin(file="some.gguf", sha256="01" * 32),
        quantisation="Q8_0, dequantised to float16",
    )
    (folder / FACTS_FILE).write_bytes(msgspec.json.encode(facts))
    model = await api.openai.models.retrieve("mine")
    assert model.model_extra == {
        "kind": "base",
        "source": "mine",
        "origin": {"file": "some.gguf", "sha256": "01" * 32},
        "quantisation": "Q8_0, dequantised to float16",
    }
    assert "mine" in [model.id async for model in api.openai.models.list()]
    assert (await api.job(seed_file, model="mine")).model == "mine"


async def test_a_tuned_model_tells_where_it_comes_from(api: Running, seed_file: Path) -> None:
    name = await tuned(api, seed_file)
    model = await api.openai.models.retrieve(name)
    assert (model.id, model.object, model.owned_by) == (name, "model", "org-rose")
    assert model.model_extra is not None
    assert model.model_extra["base_model"]["fingerprint"] == BASE.fingerprint
    assert model.model_extra["folder"] == str(api.services.blobs.path(model.model_extra["artifact"]["path"]))
    checkpoint = await api.openai.models.retrieve(f"{name}:ckpt-step-50")
    assert checkpoint.model_extra is not None
    assert checkpoint.model_extra["step"] == 50
    assert (await api.openai.models.list()).data[0].id == name


async def test_a_deleted_model_is_gone_and_its_base_is_not(api: Running, seed_file: Path) -> None:
    name = await tuned(api, seed_file)
    with pytest.raises(openai.BadRequestError) as refused:
        await api.openai.models.delete(f"{name}:ckpt-step-50")
    assert refused.value.code == "checkpoint"
    gone = await api.openai.models.delete(name)
    assert (gone.id, gone.object, gone.deleted) == (name, "model", True)
    for call in (api.openai.models.retrieve, api.openai.models.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            await call(name)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert name not in [model.id async for model in api.openai.models.list()]
    assert "tiny" in [model.id async for model in api.openai.models.list()]


@pytest.mark.parametrize("checkpoint", ["", ":ckpt-step-50"])
async def test_the_adapter_comes_as_an_archive(api: Running, seed_file: Path, checkpoint: str) -> None:
    name = await tuned(api, seed_file)
    answer = await api.http.get(f"/v1/adapters/{name}{checkpoint}")
    top = f"{name}{checkpoint}".replace(":", "-")
    assert answer.headers["content-type"] == "application/x-tar"
    assert f'filename="{top}.tar"' in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == [f"{top}/adapter_config.json", f"{top}/adapter_model.safetensors"]
        weights = archive.extractfile(f"{top}/adapter_model.safetensors")
        assert weights is not None
        assert weights.read() == (b"weights of step 50" if checkpoint else b"final weights")


async def test_a_damaged_adapter_is_not_given_out(api: Running, seed_file: Path) -> None:
    name = await tuned(api, seed_file)
    model = await api.openai.models.retrieve(name)
    assert model.model_extra is not None
    await (anyio.Path(model.model_extra["folder"]) / "adapter_model.safetensors").write_text("other weights")
    answer = await api.http.get(f"/v1/adapters/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "blob_mismatch")


async def test_training_goes_on_from_a_tuned_model_or_a_checkpoint(api: Running, seed_file: Path) -> None:
    name = await tuned(api, seed_file)
    for parent in (name, f"{name}:ckpt-step-50"):
        job = await api.job(seed_file, model=parent)
        assert job.model == parent
        assert job.model_extra is not None
        assert job.model_extra["reserved_model"].startswith("tiny-ft-")
        assert job.model_extra["reserved_model"].count("-ft-") == 1


async def test_a_checkpoint_on_a_whole_tuned_model_is_whole_itself(api: Running, seed_file: Path) -> None:
    parent = await api.job(seed_file, hyperparameters={"use_lora": False})
    trainer = Trainer(api.services, parent.id)
    await trainer.validate()
    await trainer.start()
    await trainer.succeed(50, kind="full")
    name = (await api.openai.fine_tuning.jobs.retrieve(parent.id)).fine_tuned_model
    job = await api.job(seed_file, model=name)
    await Trainer(api.services, job.id).run_to_success()
    assert job.model_extra is not None
    checkpoint = await api.openai.models.retrieve(f"{job.model_extra['reserved_model']}:ckpt-step-50")
    assert checkpoint.model_extra is not None
    assert checkpoint.model_extra["kind"] == "full"


async def test_a_model_that_is_not_made_yet_says_so(api: Running, seed_file: Path) -> None:
    job = await api.job(seed_file)
    assert job.model_extra is not None
    with pytest.raises(openai.NotFoundError) as refused:
        await api.openai.models.retrieve(job.model_extra["reserved_model"])
    assert f"{job.id} that makes it is validating_files" in refused.value.message


async def test_jobs_of_one_second_get_names_of_their_own(api: Running, seed_file: Path) -> None:
    jobs = [await api.job(seed_file, suffix="same") for _ in range(5)]
    names = {job.model_extra["reserved_model"] for job in jobs if job.model_extra}
    assert len(names) == 5


async def test_an_alias_leads_to_a_fine_tuned_model(
    api_settings: Settings, api: Running, pool: Pool, seed_file: Path
) -> None:
    """A name of another service goes on working: in the SDK, for new jobs, and in the list."""
    name = await tuned(api, seed_file)
    old, point = "ft:gpt-4o-mini-2024-07-18:acme::9uJPbR69", "ft:gpt-4o-mini-2024-07-18:acme::9uJPbR60:ckpt-step-88"
    aliases = {"short": old, old: name, point: f"{name}:ckpt-step-50", "lost": "nothing-ft-20260101_000000"}
    settings = msgspec.structs.replace(api_settings, port=free_port(), model_aliases=aliases)
    async with serving(settings, pool) as moved:
        listed = {model.id: model for model in (await moved.openai.models.list()).data}
        assert set(listed) == {name, "short", old, point, "tiny", "smollm2"}
        assert listed[old].model_extra == listed[name].model_extra | {"folder": ANY}
        for alias, true in (("short", name), (old, name), (point, f"{name}:ckpt-step-50")):
            assert (await moved.openai.models.retrieve(alias)).id == true
        job = await moved.job(seed_file, model=old)
        assert job.model == old
        state = await jobs.get(pool, "default", job.id)
        assert state is not None
        assert state.base_request.parent is not None
        assert state.base_request.parent.name == name
        with pytest.raises(openai.BadRequestError, match=f"alias of {name}") as refused:
            await moved.openai.models.delete(old)
        assert refused.value.code == "alias"
        with pytest.raises(openai.BadRequestError, match="alias of nothing-ft-20260101_000000"):
            await moved.job(seed_file, model="lost")
        await moved.openai.models.delete(name)
        with pytest.raises(openai.NotFoundError):
            await moved.openai.models.retrieve(old)

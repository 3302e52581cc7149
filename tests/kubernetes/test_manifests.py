"""The manifests and the Dockerfile of examples/kubernetes, checked layer by layer.

`kuberay_crds.json.gz` holds the schemas of RayService and RayJob, version v1, from KubeRay's
custom resource definitions (v1.7, Apache-2.0) without descriptions; pod templates are in them.
"""

import copy
import gzip
import json
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from langchain_cope.errors import InputError

yaml: Any = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
CRDS = json.loads(gzip.decompress((Path(__file__).parent / "kuberay_crds.json.gz").read_bytes()))
MANIFESTS = ("rayservice.yaml", "rayjob.yaml")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """Return a schema that refuses what it does not name, as a strict API server does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return made


@cache
def validator(kind: str) -> Any:
    schema = closed(CRDS[kind])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.validators.validator_for(schema)(schema)


def check(manifest: Any) -> None:
    """Raise jsonschema's error where an API server would refuse the manifest."""
    for error in validator(manifest["kind"]).iter_errors(manifest):
        raise error


def pods(manifest: Any) -> list[Any]:
    spec = manifest["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_their_definitions(name: str) -> None:
    check(read(name))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("rayservice.yaml", ("spec",)),
        ("rayservice.yaml", ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec")),
        ("rayjob.yaml", ("spec",)),
        ("rayjob.yaml", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec")),
    ],
)
def test_a_misspelt_key_is_caught_at_any_depth(name: str, path: tuple[Any, ...]) -> None:
    manifest = copy.deepcopy(read(name))
    part = manifest
    for step in path:
        part = part[step]
    part["colour"] = "red"
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        check(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_no_rights_and_a_read_only_root(name: str) -> None:
    for pod in pods(read(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_serve_configuration_is_rays_and_builds_the_application() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed (extra ray)")
    config = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    checked = schema.ServeDeploySchema.model_validate(config)
    (application,) = checked.applications
    module, _, name = application.import_path.partition(":")
    built = getattr(import_module(module), name)(application.args)
    assert built._bound_deployment.name == "Door"
    # Ray's own schema passes over what it does not know.
    assert config.keys() <= schema.ServeDeploySchema.model_fields.keys()
    assert config["applications"][0].keys() <= schema.ServeApplicationSchema.model_fields.keys()
    with pytest.raises(InputError, match="'colour' is no setting"):
        getattr(import_module(module), name)({**application.args, "colour": "red"})


def test_the_job_gives_a_command_that_exists() -> None:
    import typer.main
    from cope_lc.main import app

    program, command, *words = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert program == "cope-lc"
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    known.make_context(command, list(words))  # raises where an option does not exist


def test_the_image_runs_as_nobody_and_installs_what_exists() -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER 10001$", lines, re.MULTILINE)
    project = (FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r'"\.\[(.*)\]"', lines)
    assert extras is not None
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", lines, re.MULTILINE):
        for name in copied.split():
            assert (FOLDER.parents[1] / name).exists(), name

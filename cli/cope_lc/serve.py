"""`cope-lc serve`: every user's own voice over the OpenAI protocol."""

import dataclasses
import json
import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import DEFAULT_MODEL, Device, Dtype, Model, Store, TaskAdapter

if TYPE_CHECKING:
    from langchain_cope.serving import ServeSettings


_SECRET = re.compile(r"//[^/@]*@")  # user and password in a URL


class Train(StrEnum):
    """Where personalizations run."""

    thread = "thread"
    off = "off"


class LogLevel(StrEnum):
    """What is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a TOML file's values as defaults, which flags and the environment outdo."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is no TOML: {error}") from None
    known = {parameter.name for parameter in context.command.params}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise typer.BadParameter(f"{path} sets {unknown[0]!r}, which is no option of serve")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _option(name: str, text: str, **more: Any) -> Any:
    variable = f"COPE_SERVE_{name.strip('-').upper().replace('-', '_')}"
    return typer.Option(name, help=text, envvar=variable, show_envvar=False, **more)


def serve(
    model: Model = DEFAULT_MODEL,
    task_adapter: TaskAdapter = None,
    store: Store = None,
    keys: Annotated[
        Path | None,
        _option(
            "--keys",
            "Key file that `cope-lc keys new` made. Default: none; then only programs of this "
            "machine are answered.",
            metavar="FILE",
        ),
    ] = None,
    host: Annotated[
        str, _option("--host", "Address to listen on; all but loopback need --keys.", metavar="H")
    ] = "127.0.0.1",
    port: Annotated[
        int, _option("--port", "Port to listen on; 0: any free one.", min=0, max=65535, metavar="P")
    ] = 8000,
    app: Annotated[bool, _option("--app", "Serve the page at /app/, too.")] = False,
    data: Annotated[
        Path | None,
        _option(
            "--data",
            "Folder of the users' histories and of trainings under way. Default: the user data "
            "folder.",
            metavar="DIR",
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        _option("--served-name", "What clients call the base. Default: its name.", metavar="NAME"),
    ] = None,
    user_header: Annotated[
        str | None,
        _option(
            "--user-header",
            "Header in which trusted proxies name the user, such as X-OpenWebUI-User-Id; it counts "
            "for keys made with --trusted-header alone.",
            metavar="NAME",
        ),
    ] = None,
    public_prompt: Annotated[
        Path | None,
        _option(
            "--public-prompt",
            "File with a system prompt that is no secret: what is computed of it is shared among "
            "all users.",
            metavar="FILE",
        ),
    ] = None,
    train: Annotated[
        Train, _option("--train", "Where personalizations run; off: not here.")
    ] = Train.thread,
    max_rows: Annotated[
        int,
        _option(
            "--max-rows", "Rows decoded together; a personal answer takes two.", min=2, metavar="N"
        ),
    ] = 64,
    max_waiting: Annotated[
        int,
        _option(
            "--max-waiting", "Requests that may wait; further ones get 429.", min=1, metavar="N"
        ),
    ] = 256,
    max_concurrent: Annotated[
        int | None,
        _option("--max-concurrent", "Requests that a key may have at a time.", min=1, metavar="N"),
    ] = None,
    answer_tokens: Annotated[
        int,
        _option(
            "--answer-tokens",
            "Tokens of an answer where the request names no bound.",
            min=1,
            metavar="N",
        ),
    ] = 512,
    drain_delay: Annotated[
        float,
        _option(
            "--drain-delay",
            "Seconds between not being ready any more and taking no more connections.",
            min=0,
            metavar="N",
        ),
    ] = 0.0,
    drain: Annotated[
        float,
        _option(
            "--drain", "Seconds that answers under way may take at the end.", min=0, metavar="N"
        ),
    ] = 30.0,
    device: Device = None,
    dtype: Dtype = None,
    ray: Annotated[
        str | None,
        _option(
            "--ray",
            "Serve on a Ray cluster: auto, HOST:PORT, or local for one of this machine. Needs "
            "--keys; trainings run elsewhere (personalize-fleet).",
            metavar="ADDRESS",
        ),
    ] = None,
    replicas: Annotated[
        int,
        _option("--replicas", "With --ray: how many engines answer.", min=1, metavar="N"),
    ] = 1,
    log_level: Annotated[
        LogLevel, _option("--log-level", "debug, info or warning.", metavar="LEVEL")
    ] = LogLevel.info,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_read_config,
            help="TOML file with these options by their names. Flags win over the environment "
            "(COPE_SERVE_PORT and so on), which wins over the file.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what would be served, and do not.")
    ] = False,
) -> None:
    """Serve every user's own voice over the OpenAI protocol.

    The key decides whose voices may be asked for. Without keys only programs of this machine are
    answered.
    """
    settings = _settings(
        model=model,
        task_adapter=task_adapter,
        store=store,
        keys=keys,
        host=host,
        port=port,
        app=app,
        data=data,
        served_name=served_name,
        user_header=user_header,
        public_prompt=public_prompt,
        train=train.value,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_concurrent=max_concurrent,
        answer_tokens=answer_tokens,
        drain_delay=drain_delay,
        drain=drain,
        device=device,
        dtype=dtype,
    )
    if print_config:
        shown = dataclasses.asdict(settings)
        shown["store"] = _SECRET.sub("//…@", settings.store) if settings.store else None
        print(json.dumps(shown, indent=2, default=str, ensure_ascii=False))
        return
    if ray is not None:
        from langchain_cope.serving.on_ray import serve_on_ray

        serve_on_ray(settings, ray, replicas)
        return
    from langchain_cope.serving import serve as run

    run(settings, log_level.value)


def _settings(**options: Any) -> "ServeSettings":
    """Return the settings; raises typer's own error where the extra is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise typer.BadParameter(
            f"{error.name} is missing: pip install 'langchain-cope[serve]'"
        ) from None
    from langchain_cope.engine import EngineOptions
    from langchain_cope.serving import ServeSettings

    prompt = options.pop("public_prompt")
    if prompt is not None:
        options["public_prompt"] = prompt.read_text(encoding="utf-8").strip()
    engine_options = EngineOptions(max_rows=options.pop("max_rows"))
    given = {name: value for name, value in options.items() if value is not None}
    return ServeSettings(engine_options=engine_options, **given)

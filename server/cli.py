"""The command line: `layerskip serve`, and the commands that make checkpoints and look inside them.

Knows flags, the listening socket and exit codes; everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import inspect
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from config.errors import SettingsError, StartupError
from config.setting_sources import flag_name, refuse_unknown, variable_name
from config.setting_texts import default_text, takes_several
from config.setting_types import LogFormat
from config.settings import Settings
from server.commands.bench import bench
from server.commands.verify import verify
from training.commands.convert import convert
from training.commands.heal import heal
from training.commands.inspect import inspect as inspect_layers
from training.commands.sweep import sweep
from training.commands.train import train

if TYPE_CHECKING:
    from server.observers import StartListener
    from server.worker import EngineLoader

app = typer.Typer(
    name="layerskip", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

_BACKLOG: Final = 2048
# Unknown flags are left to us, so that the refusal is one line like every other.
_FLAGS_PASS: Final = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.callback()
def layerskip() -> None:
    """Serve LayerSkip checkpoints with batched self-speculative decoding."""


def _with_settings_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` a flag for every setting. Values stay text: the settings model alone judges them."""
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        _parameter(
            "checkpoint",
            typer.Argument(
                metavar="MODEL…", help="Same as --model; of several, as --models.", show_default=False
            ),
        ),
    ]
    for name, field in Settings.model_fields.items():
        help_text = f"{field.description} [{variable_name(name)}; default: {default_text(name, field)}]"
        option = typer.Option(flag_name(name), metavar="VALUE", help=help_text, show_default=False)
        parameters.append(_parameter(name, option, takes_several=takes_several(field)))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, kind: object, *, takes_several: bool = False) -> inspect.Parameter:
    annotation = Annotated[list[str] | None, kind] if takes_several else Annotated[str | None, kind]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command(context_settings=_FLAGS_PASS)
@_with_settings_flags
def serve(context: typer.Context, **values: str | list[str] | None) -> None:
    """Serve checkpoints over HTTP; without MODEL, the bundled one. Flags win over LAYERSKIP_* variables,
    these over the YAML file of --config, and that over the defaults.
    """
    from server.worker import load_engine

    given = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
    raise typer.Exit(run(chosen_settings(context.args, given), load=load_engine))


for _command in (train, heal, convert, sweep, bench, verify):
    app.command()(_command)
app.command("inspect")(inspect_layers)


def chosen_settings(extra: list[str], values: Mapping[str, str | None]) -> Settings:
    """Settings from the flags that were given. Raises SettingsError, also for what is no flag at all."""
    flags: dict[str, object] = {name: value for name, value in values.items() if value is not None}
    first = flags.pop("checkpoint", None)
    checkpoints = [*([] if first is None else [str(first)]), *extra]
    for word in checkpoints:
        if word.startswith("-"):
            refuse_unknown(word.partition("=")[0], [*map(flag_name, Settings.model_fields)], "flag")
    named: dict[str, object] = {"models": checkpoints} if len(checkpoints) > 1 else {}
    if len(checkpoints) == 1:
        named = {"model": checkpoints[0]}
    for name in named.keys() & flags.keys():
        if named[name] != flags[name]:
            both = f"{name} {checkpoints[0]}: {flag_name(name)} says {flags[name]}"
            raise SettingsError(f"{both}; give one of them")
    return Settings.load(flags | named)


def run(settings: Settings, *, load: EngineLoader) -> int:
    """Serve until a signal comes; returns the exit code. Raises SettingsError when the port is taken."""
    from server.app import create_app
    from server.http_server import HttpServer
    from server.request_log import start_logging

    start_logging(settings.log_level, settings.log_format)
    # The port is taken before the worker starts: loading a model to then find it busy helps nobody.
    with listen(settings.host, settings.port) as listener:
        application = create_app(settings, load=load, listener=_start_listener(settings, url_of(listener)))
        HttpServer(application).serve_until_signal(listener)
    return 1 if application.models.are_gone else 0


def _start_listener(settings: Settings, url: str) -> Callable[[str], StartListener]:
    """Who tells how a model's start goes: words for people, or the log where every line must be JSON."""
    from server.app import LogListener
    from server.banner import Site, Terminal

    if settings.log_format is LogFormat.JSON:
        return partial(LogListener, url=url)
    site = Site(
        url,
        needs_key=settings.api_key is not None or settings.api_key_file is not None,
        has_several_models=settings.models is not None,
    )
    return partial(Terminal, sys.stderr, site)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise _explain(error, host, port) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL that reaches a listening socket from this machine."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def _explain(error: OSError | UnicodeError, host: str, port: int) -> SettingsError:
    if isinstance(error, socket.gaierror | UnicodeError):
        return SettingsError(f"host {host}: no such address; pass --host")
    if error.errno == errno.EADDRINUSE:
        return SettingsError(f"port {port} is in use; pass --port")
    return SettingsError(f"cannot listen on {host} port {port}: {error.strerror}; pass --host or --port")


def main() -> None:
    """Entry of the `layerskip` command: what the operator can mend is said in one line."""
    try:
        app()
    except StartupError as error:
        print(f"layerskip: {error}", file=sys.stderr)
        sys.exit(1)

"""`layerskip verify`: that speculation changes no text, asked of a running server.

Knows flags, wording and exit codes; what is asked and compared is imported by the function itself.
"""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

if TYPE_CHECKING:
    from server.api_client import ApiClient
    from server.transparency import Difference, Findings

_EXIT_DIFFERS: Final = 1
_EXIT_UNDECIDED: Final = 2
_SHOWN_CHARS: Final = 60


def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the server is: http://HOST:PORT")],
    requests: Annotated[int, typer.Option(min=1, help="Random requests; each is sent twice.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 8,
    seed: Annotated[
        int | None,
        typer.Option(help="Sends the same requests again. [default: random]", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    model: Annotated[
        str | None, typer.Option(help="Name of the model. [default: the first]", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer key, where the server wants one.", show_default=False)
    ] = None,
) -> None:
    """Send random requests with and without drafts, all mixed, and compare the texts, which must be the same.

    Exits with 0 if they are, with 1 and a counterexample as curl lines if not, and with 2 if it was not found
    out: there is no such server, no draft was made, or none was refused.
    """
    from server.api_client import ApiClient, ClientError
    from server.transparency import Plan, compare

    chosen = secrets.randbelow(2**31) if seed is None else seed
    try:
        client = ApiClient(url, api_key=api_key)
        bounds = client.server_info(model)
        plan = Plan.draw(bounds, num_requests=requests, seed=chosen, max_tokens=max_tokens)
        print(
            f"{bounds.model}: {requests} requests, {concurrency} at once, exit layers "
            f"{_listed(bounds.allowed_exit_layers)}, draft lengths 0 to {bounds.limits.max_draft_length}, "
            f"--seed {chosen}",
            file=sys.stderr,
        )
        findings = compare(client, plan, concurrency=concurrency)
        _report(client, findings)
    except ClientError as error:
        _give_up(str(error))


def _report(client: ApiClient, findings: Findings) -> None:
    print(
        f"{findings.num_requests} requests, {len(findings.differences)} differences, "
        f"{findings.num_refused} drafts refused"
    )
    if findings.differences:
        _show(client, min(findings.differences, key=lambda difference: difference.size))
        raise typer.Exit(_EXIT_DIFFERS)
    if findings.num_unwanted:
        _give_up(f"{findings.num_unwanted} drafts were made for requests with draft_length 0")
    if not findings.num_drafted:
        _give_up("no draft was made, so nothing was found out; send more --requests of more --max-tokens")
    if not findings.num_refused:
        _give_up("no draft was refused, so refusing was not tried; send more --requests of more --max-tokens")


def _show(client: ApiClient, difference: Difference) -> None:
    """The counterexample, and whether it needs the company of other requests."""
    from server.transparency import differs_alone

    start = max(0, difference.position - _SHOWN_CHARS // 2)
    window = slice(start, start + _SHOWN_CHARS)
    print(f"\nThe shortest: choice {difference.choice} differs from character {difference.position} on.")
    print(f"  with drafts     {difference.speculative[window]!r} {difference.speculative_end}")
    print(f"  without drafts  {difference.plain[window]!r} {difference.plain_end}\n")
    print(client.curl(difference.body))
    print(client.curl(difference.plain_body))
    if differs_alone(client, difference.body):
        print("\nSent again, each alone, the two differ as well.")
    else:
        print("\nSent again, each alone, the two are the same: it takes all that --seed sends beside them.")


def _listed(numbers: list[int]) -> str:
    """Numbers without gaps as a range."""
    is_range = len(numbers) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]
    return f"{numbers[0]} to {numbers[-1]}" if is_range else ", ".join(map(str, numbers))


def _give_up(reason: str) -> NoReturn:
    print(f"layerskip verify: {reason}", file=sys.stderr)
    raise typer.Exit(_EXIT_UNDECIDED)

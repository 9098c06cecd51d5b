"""`headwater serve`: scores as a page that is asked, on this machine."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from headwater.cli.app import LOOK, app, command


@app.command(group=LOOK)
def serve(
    store: Annotated[str, Parameter(help="A job file, whose setup is run; or a folder: results, a run, saved scores.")],
    /,
    *,
    port: int = 0,
    k: int | None = None,
    show: Annotated[bool, Parameter(name="--open", negative="")] = False,
) -> None:
    """Show finished scores as a page for this machine's browser: any query, and its rows at once; any train row, too.

    Only 127.0.0.1 is listened at, the page's address has a token, and nothing is written or computed. A run's scores
    stay on disk: a case is read when it is asked for. Of a job file, the setup says what rows are: it is your own code,
    and is run. Ctrl-C ends it, with status 130.

    Parameters
    ----------
    port
        Where to listen; 0 takes a port that is free.
    k
        Rows at each end at first, in place of the job's; the page offers others, up to 100.
    show
        Open the page in a browser. Its address, with the token, is then among the browser's arguments, which other
        users of this machine may be able to list.
    """
    from headwater.settings import check_whole  # brings NumPy, which --help does without

    check_whole("port", port, 0, 65535)
    if k is not None:
        check_whole("k", k, 1, 100)
    from headwater.job.served import served
    from headwater.report.server import Server

    live = served(store, k, command.get())
    with Server(live, port) as server:
        print(f"{live.scores!r}: {server.address} (Ctrl-C stops it)", flush=True)
        if show:
            import webbrowser

            webbrowser.open(server.address)
        server.serve_forever()

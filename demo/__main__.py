"""`python -m demo --model miniworld [--adapter FOLDER]`: load a model and serve the chat page."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

BASE = "base"  # the model without an adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the chat until interrupted. Returns the exit status: 2 after an error that the user can mend."""
    args = _parser().parse_args(argv)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # an orderly end, so that uploads go with the process
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start behind ignore it
    from mllm.common.errors import UserError

    try:
        _serve(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(args: argparse.Namespace) -> None:
    from demo.api import build_api  # imports of seconds, after --help
    from demo.scheduler import Places
    from demo.session import ChatSession, load_examples
    from mllm.build import load, share_weights
    from mllm.common.precision import find_device
    from mllm.inference.generate import KEPT, set_aside

    device = find_device(args.device, key="--device")
    examples = load_examples(args.examples) if args.examples else []
    places = Places(waiting=args.queue, a_client=args.per_client)
    adapters = _adapters(args.adapter)
    args.model = args.model or _default_model(bool(args.adapter))
    sessions, base = {}, None
    for name, folder in adapters.items():
        model, processor = load(args.model, adapter=folder, device=device)
        base = base or share_weights(model)
        share_weights(model, base)
        sessions[name] = ChatSession(model.eval(), processor, places=places)
    if habits := set_aside(model):
        left = ", ".join(f"{name} {value}" for name, value in habits.items())
        print(f"Of the checkpoint's own generation settings only {', '.join(KEPT)} is kept, not {left}.", flush=True)
    (name, session), *others = sessions.items()
    alone = adapters == {BASE: None}
    named = {Path(args.model).name: session} if alone else sessions
    api = build_api(named, api_key=args.api_key, auth=args.auth)
    if args.page:
        from demo.app import build_app, launch

        adapter = None if alone else name
        app = build_app(session, model=args.model, adapter=adapter, examples=examples, others=dict(others))
        url = launch(
            app,
            host=args.host,
            port=args.port,
            share=args.share,
            allowed_hosts=args.allow_host,
            auth=args.auth,
            api=api,
        )
        print(f"Chat at {url} (Ctrl+C ends it)", flush=True)
        app.block_thread()
    else:
        from demo.serve import serve

        serve(api, host=args.host, port=args.port, allowed_hosts=args.allow_host)


def _default_model(has_adapter: bool) -> str:
    """The largest base there is; adapters made without naming one are miniworld's."""
    from mllm.bases import fetched

    is_there = (fetched.folder(fetched.SMOL) / "config.json").is_file()
    return fetched.SMOL if is_there and not has_adapter else "miniworld"


def _adapters(texts: Sequence[str]) -> dict[str, str | None]:
    """Name -> folder, None for the base, which stands beside several adapters as one more.

    A name left out is the run's: runs/experts/adapter is "experts"; the path is nobody's business.
    """
    from mllm.common.errors import UserError

    named: dict[str, str | None] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            path = Path(text).resolve()
            name, folder = path.parent.name if path.name == "adapter" else path.name, text
        if not name or not folder or name in named or name == BASE:
            raise UserError(f"--adapter {text}: expected NAME=FOLDER, each name once, and none of them {BASE!r}.")
        named[name] = folder
    return named if len(named) == 1 else {**named, BASE: None}


def _user(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("expected USER:PASSWORD")
    return user, password


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1000, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    """A port's number; argparse tells the error's words."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllm chat", description="Chat with a model about pictures, in a browser.")
    parser.add_argument(
        "--model", help="folder, hub id, `smol` (default once fetched, unless an adapter is given) or `miniworld`"
    )
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]FOLDER",
        help="adapter made by training; repeat to switch among several and to compare them with the base",
    )  # fmt: skip
    parser.add_argument("--examples", help="LLaVA JSON file, or a folder with one, whose first questions are offered")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first GPU, or else the CPU)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=_port, default=7860, help="port to serve on (default: 7860)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name that browsers call this server by, beside its address, localhost and this machine's; repeat",
    )  # fmt: skip
    parser.add_argument(
        "--auth", type=_user, metavar="USER:PASSWORD", help="who may chat; programs may show it as Basic"
    )
    parser.add_argument("--api-key", metavar="KEY", help="what programs must show as bearer; without it all may ask")
    parser.add_argument("--queue", type=_count, default=16, help="questions that may wait (default: 16)")
    parser.add_argument("--per-client", type=_count, default=1, help="of them, of one client (default: 1)")
    parser.add_argument("--no-page", dest="page", action="store_false", help="serve programs alone, as `mllm serve`")
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's servers")
    return parser


if __name__ == "__main__":
    sys.exit(main())

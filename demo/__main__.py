"""`python -m demo --model miniworld [--adapter FOLDER]`: load a model and serve the chat page."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the chat until interrupted. Returns the exit status: 2 after an error that the user can mend."""
    args = _parser().parse_args(argv)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # an orderly end, so that uploads go with the process
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    from demo.app import build_app, launch  # imports of seconds, after --help
    from demo.session import ChatSession, load_examples
    from mllm.build import load
    from mllm.common.errors import UserError
    from mllm.common.precision import find_device
    from mllm.inference.generate import KEPT, set_aside

    try:
        device = find_device(args.device, key="--device")
        examples = load_examples(args.examples) if args.examples else []
        model, processor = load(args.model, adapter=args.adapter, device=device)
        if habits := set_aside(model):
            left = ", ".join(f"{name} {value}" for name, value in habits.items())
            print(
                f"Of the checkpoint's own generation settings only {', '.join(KEPT)} is kept, not {left}.", flush=True
            )
        adapter = Path(args.adapter).resolve() if args.adapter else None
        name = adapter and f"{adapter.parent.name}/{adapter.name}"  # runs/experts/adapter: the run tells, not the path
        app = build_app(ChatSession(model.eval(), processor), model=args.model, adapter=name, examples=examples)
        url = launch(app, host=args.host, port=args.port, share=args.share, allowed_hosts=args.allow_host)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Chat at {url} (Ctrl+C ends it)", flush=True)
    app.block_thread()
    return 0


def _port(text: str) -> int:
    """A port's number; argparse tells the error's words."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mllm chat", description="Chat with a model about pictures, in a browser.")
    parser.add_argument(
        "--model", default="miniworld", help="folder, hub id, `smol` once fetched, or `miniworld` (default)"
    )
    parser.add_argument("--adapter", help="adapter folder made by training")
    parser.add_argument("--examples", help="LLaVA JSON file, or a folder with one, whose first questions are offered")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first GPU, or else the CPU)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=_port, default=7860, help="port to serve on (default: 7860)")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name that browsers call this server by, beside its address, localhost and this machine's; repeat",
    )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's servers")
    return parser


if __name__ == "__main__":
    sys.exit(main())

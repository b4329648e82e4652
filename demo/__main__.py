"""`python -m demo --model miniworld [--adapter FOLDER]`: load a model and serve the chat page."""

import argparse
import sys
from collections.abc import Sequence

import torch

from demo.app import build_app, launch
from demo.session import ChatSession, load_examples
from mllm.build import load
from mllm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the chat until interrupted. Returns the exit status: 2 after an error that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        examples = load_examples(args.examples) if args.examples else []
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load(args.model, adapter=args.adapter, device=device)
        app = build_app(ChatSession(model.eval(), processor), model=args.model, adapter=args.adapter, examples=examples)
        url = launch(app, host=args.host, port=args.port, share=args.share)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Chat at {url} (Ctrl+C ends it)", flush=True)
    app.block_thread()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description="Chat with a model about pictures, in a browser."
    )
    parser.add_argument("--model", default="miniworld", help="folder, hub id, `smol`, or `miniworld` (default)")
    parser.add_argument("--adapter", help="adapter folder made by training")
    parser.add_argument("--examples", help="LLaVA JSON file, or a folder with one, whose first questions are offered")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first GPU, or else the CPU)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's servers")
    return parser


if __name__ == "__main__":
    sys.exit(main())

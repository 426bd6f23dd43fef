"""``python -m attn_mask``: commands for a terminal."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def _doctor(as_json: bool) -> int:
    from attn_mask._transformers.doctor import diagnose, written

    # Whatever else is said while transformers is imported goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if as_json else written(diagnosis))
    return 0 if diagnosis["ok"] else 1


def _show(
    q: int, kv: int | None, causal: bool, window: int | None, left_padding: int, documents: Any
) -> int:
    import torch

    import attn_mask

    rule = attn_mask.causal() if causal else attn_mask.bidirectional()
    if window is not None:
        rule &= attn_mask.sliding_window(window)
    kv = kv or q
    if left_padding > kv:
        _refuse(f"show: expected --left-padding up to {kv}, but got {left_padding}")
    if left_padding:
        rule &= attn_mask.padding(torch.arange(kv) >= left_padding)
    if documents is not None:
        lengths = [int(length) if length.isdecimal() else 0 for length in documents.split(",")]
        if min(lengths) < 1 or sum(lengths) != q:
            _refuse(
                f"show: expected --documents to be lengths that add up to {q}, such as 5,7, "
                f"but got {documents}"
            )
        if kv != q:
            _refuse(f"show: expected as many keys as queries beside --documents, got {kv}")
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        rule &= attn_mask.documents(ids)
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        print(attn_mask.show(rule, q, kv, style="color" if colors else None))
    except ValueError as error:
        _refuse(str(error))
    return 0


def _bench(quick: bool) -> int:
    from attn_mask._tools.bench import bench

    return bench(quick)


def _refuse(text: str) -> NoReturn:
    print(f"python -m attn_mask: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an int of at least {least}, but got {text}")
        return int(text)

    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message)  # in one line


def _parser() -> _Parser:
    about = "attn_mask: attention masks, looked at and tried."
    parser = _Parser("python -m attn_mask", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[..., int], says: str) -> Callable[..., object]:
        name = run.__name__.removeprefix("_")
        made = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        made.set_defaults(run=run)
        return made.add_argument

    option = command(_doctor, "Says what is here, whether it works, and what to do where not.")
    option("--json", dest="as_json", action="store_true", help="One JSON object on stdout.")
    option = command(_show, "Draws a mask.")
    option("--q", type=_at_least(1), required=True, help="How many queries.")
    option("--kv", type=_at_least(1), help="How many keys; as many as queries.")
    option("--causal", action="store_true", help="No keys after the query.")
    option("--window", type=_at_least(1), help="So many keys up to the query's own.")
    option("--left-padding", type=_at_least(0), default=0, help="So many keys are padding.")
    option("--documents", help="Lengths that add up to q, as in 5,7.")
    compares = "Compares how long masks take, ours and transformers', on this machine's CPU."
    option = command(_bench, compares)
    option("--quick", action="store_true", help="Small masks, a moment each: a try.")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 for a fault that doctor has found, 2 for arguments that can't be."""
    try:
        given = vars(_parser().parse_args(arguments))
        status: int = given.pop("run")(**given)
    except SystemExit as ended:
        return int(ended.code or 0)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

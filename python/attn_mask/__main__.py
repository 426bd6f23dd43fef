"""``python -m attn_mask``: commands for a terminal."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence

_NEEDS = "needs typer and rich (the extra attn_mask[cli]): pip install typer rich"


def _doctor(as_json: bool) -> int:
    from attn_mask._tools.doctor import diagnose, written

    # Whatever else is said while transformers is imported goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if as_json else written(diagnosis))
    return 0 if diagnosis["ok"] else 1


def _picture(
    q: int, kv: int, causal: bool, window: int | None, left_padding: int, documents: str | None
) -> str:
    """Raises ValueError for what does not fit together."""
    import torch

    import attn_mask

    rule = attn_mask.causal() if causal else attn_mask.bidirectional()
    if window is not None:
        rule &= attn_mask.sliding_window(window)
    if left_padding > kv:
        raise ValueError(f"show: expected --left-padding up to {kv}, but got {left_padding}")
    if left_padding:
        rule &= attn_mask.padding(torch.arange(kv) >= left_padding)
    if documents is not None:
        expected = f"show: expected --documents to be lengths that add up to {q}, such as 5,7"
        try:
            lengths = [int(length) for length in documents.split(",")]
        except ValueError:
            raise ValueError(f"{expected}, but got {documents}") from None
        if min(lengths) < 1 or sum(lengths) != q:
            raise ValueError(f"{expected}, but got {documents}")
        if kv != q:
            raise ValueError(f"show: expected as many keys as queries beside --documents, got {kv}")
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        rule &= attn_mask.documents(ids)
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return attn_mask.show(rule, q, kv, style="color" if colors else None)


def _refuse(text: str) -> int:
    print(f"python -m attn_mask: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _without_typer(arguments: Sequence[str]) -> int:
    if list(arguments[:1]) != ["doctor"]:
        return _refuse(f"only doctor works as it is, the rest {_NEEDS}")
    for argument in arguments[1:]:
        if argument != "--json":
            return _refuse(f"doctor: expected --json or nothing, but got {argument}")
    return _doctor(len(arguments) > 1)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 for a fault that doctor has found, 2 for arguments that can't be."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        return _without_typer(arguments)

    app = typer.Typer(add_completion=False, help="attn_mask: attention masks, looked at and tried.")

    @app.callback()
    def commands() -> None:
        pass

    @app.command()
    def doctor(
        as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
    ) -> int:
        """Says what is here, whether it works, and what to do where not."""
        return _doctor(as_json)

    @app.command()
    def show(
        q: int = typer.Option(..., min=1, help="How many queries."),
        kv: int | None = typer.Option(None, min=1, help="How many keys; as many as queries."),
        causal: bool = typer.Option(False, "--causal", help="No keys after the query."),
        window: int | None = typer.Option(None, min=1, help="So many keys up to the query's own."),
        left_padding: int = typer.Option(0, min=0, help="So many keys are padding."),
        documents: str | None = typer.Option(None, help="Lengths that add up to q, as in 5,7."),
    ) -> int:
        """Draws a mask."""
        try:
            picture = _picture(q, q if kv is None else kv, causal, window, left_padding, documents)
        except ValueError as error:
            return _refuse(str(error))
        print(picture)
        return 0

    @app.command()
    def bench(
        quick: bool = typer.Option(False, "--quick", help="Small masks, a moment each: a try."),
    ) -> int:
        """Compares how long masks take, ours and transformers', on this machine's CPU."""
        from attn_mask._tools.bench import bench as run_bench

        return run_bench(quick)

    try:
        status = app(list(arguments), prog_name="python -m attn_mask", standalone_mode=False)
    except Exception as error:
        # Of click's exceptions, whose module depends on the release of typer.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _refuse(message() or "expected a command: see --help")
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

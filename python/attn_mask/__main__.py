"""``python -m attn_mask``: commands for a terminal."""

import contextlib
import json
import sys
from collections.abc import Sequence

_NEEDS = "needs typer and rich (the extra attn_mask[cli]): pip install typer rich"


def _doctor(as_json: bool) -> int:
    from attn_mask._doctor import diagnose, written

    # Whatever else is said while transformers is imported goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if as_json else written(diagnosis))
    return 0 if diagnosis["ok"] else 1


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

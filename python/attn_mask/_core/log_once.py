"""What users should know but need not act on: logged once in a process."""

import logging

from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_mask._core import process
from attn_mask._core.tracing import is_recording

_logger = logging.getLogger("attn_mask")
_named: set[str] = process.kept("named", set)
_details: set[str] = process.kept("details that were named", set)
# What was logged as a warning, for status().
texts: list[str] = process.kept("texts that were named", list)


def was_warned(kind: str) -> bool:
    """Whether warn_once would log nothing (any more), so that the check can be left out."""
    # A mode (make_fx, fake tensors) may be recording, too.
    return is_recording() or _get_current_dispatch_mode() is not None or kind in _named


def warn_once(kind: str, message: str, *arguments: object) -> None:
    """Logs a warning, the first of its ``kind``; none while a graph is recorded."""
    if was_warned(kind):
        return
    _named.add(kind)
    texts.append(message % arguments if arguments else message)
    _logger.warning(message, *arguments)


def log_detail_once(message: str, *arguments: object) -> None:
    """Logs a line for who debugs, the first of its text; none while a graph is recorded."""
    if is_recording() or not _logger.isEnabledFor(logging.DEBUG):
        return
    text = message % arguments
    if text not in _details:
        _details.add(text)
        _logger.debug("%s", text)

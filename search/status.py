"""How the command ends: its exit status, and of an error a line or three. Light, as every command begins with it."""

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from search.interrupts import LEFT_BEHIND
from vae.config import InputError, printable


def end_with_status(command: Callable[[], object], *, is_debugging: bool = False) -> NoReturn:
    """0 done, 1 failed, 2 wrong usage or file, 130 and 143 interrupted. is_debugging: errors are raised."""
    try:
        command()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if is_debugging:
            raise
        text = str(error) or type(error).__name__
        print("vaesearch:", printable(text, but="\n\t"), file=sys.stderr)  # names in it may be anybody's
        _leave(2 if isinstance(error, InputError) else 1)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the process; at once where a storage that does not answer would hold up the usual end."""
    if any(thread.name == LEFT_BEHIND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

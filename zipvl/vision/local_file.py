"""Which paths the reader touches: regular local files and nothing else."""

import os
import re
import stat

from ..errors import MediaError


def local_file(source: str | os.PathLike) -> str:
    """`source` as the path of a readable regular file; MediaError says what else it is."""
    try:
        path = os.fspath(source)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
            raise MediaError(f"{path} is not a local file: download it and give its path") from None
        raise MediaError(f"{path} does not exist: check the path") from None
    except (OSError, TypeError, ValueError) as e:
        raise MediaError(
            f"the video {source!r:.200} is no path of a file that can be read: {e}"
        ) from None
    if stat.S_ISDIR(mode):
        raise MediaError(f"{path} is a directory: give the path of one video file")
    if not stat.S_ISREG(mode):
        raise MediaError(f"{path} is a pipe or a device: save the video to a regular file first")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path} may not be read: change its permissions")
    if not os.path.getsize(path):
        raise MediaError(f"{path} is empty: copy or download it again")
    return path

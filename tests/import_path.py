"""Where a process of a test finds what it imports."""

import os


def import_path(*folders):
    """PYTHONPATH with these folders before those that it has: what was put there by hand is found, too."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])

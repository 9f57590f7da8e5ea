"""Headers mutated by what they reach: atheris keeps the inputs that run new lines of the readers, and changes those.

Hypothesis damages whole files, which end in the same few sentences; inputs that grow towards new lines come to those
behind. FUZZ_EXAMPLES sets how many each format gets: ten times as many, as they are quick (`make fuzz`: 100,000).
Without atheris, which has no build for Windows nor for the newest Python, hypothesis alone is used.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = 10 * int(os.environ.get("FUZZ_EXAMPLES", "100"))
LARGEST = 1500


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs the package atheris")
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_headers_by_coverage(kind, tmp_path):
    # libFuzzer ends its process, and says there what it did.
    options = (f"-runs={INPUTS}", f"-max_len={LARGEST}", "-timeout=10", f"-artifact_prefix={tmp_path}/")
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__, kind, str(tmp_path), *options], capture_output=True, text=True, timeout=3600,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and f"Done {INPUTS} runs" in said, said[-3000:]
    # Coverage grew, so the readers are instrumented.
    assert len(list((tmp_path / "corpus").iterdir())) > 1


def fuzz(kind, folder, options):
    """In a process of its own."""
    import atheris
    from limits import bounded

    with atheris.instrument_imports(include=["wanvideo_wrapper.wanvideo"]):
        import header_files
    seeds, corpus = folder / "seeds", folder / "corpus"
    for place in (seeds, corpus):
        place.mkdir()
    (corpus / "seed").write_bytes(header_files.small_files(seeds)[kind])
    path = folder / f"m.{kind}"

    def one(data):
        path.write_bytes(data)
        # libFuzzer has the alarm, and ends the process after 10 s.
        with bounded(path):
            header_files.opened(path)

    atheris.Setup(["fuzz", *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

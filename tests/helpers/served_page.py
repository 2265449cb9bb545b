"""Runs `ask-lightning serve` with its arguments until the page answers, then ends it by Ctrl-C."""

import re
import signal
import subprocess
import sys
from urllib.request import urlopen


def main() -> None:
    """Fails if the page does not answer, or if Ctrl-C is no quiet end."""
    command = [sys.executable, "-m", "ask_lightning", "serve", *sys.argv[1:], "--port", "0"]
    # A shell may have had this process ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"The page is at (http://\S+) until Ctrl-C", line):
                with urlopen(found[1], timeout=60) as response:
                    assert response.status == 200
                    assert "Search sounds" in response.read().decode()
                break
        else:
            raise AssertionError("It ended before the page was there.")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT), process.returncode
        print("The page answers.")
    finally:
        process.kill()


if __name__ == "__main__":
    main()

"""The packages of extras are imported at the moment they are needed."""

import subprocess
import sys


def test_importing_the_data_room_needs_none_of_them():
    # Lightning may import some of them by itself, as the last ones for Python 3.10 do.
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); import ask_lightning.data; "
        "assert not {'h5py', 'pyarrow', 'datasets'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
